"""The rates that the script measures make a file that a plan reads."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sae_train.training.hardware import load_hardware

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_hardware", SCRIPTS / "measure_hardware.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_measured_file_loads(script: ModuleType, tmp_path: Path) -> None:
    lines: list[str] = []
    found = script.measure(price=0.25, link=2e9, within=0.001, say=lines.append)
    (tmp_path / "here.yaml").write_text(script.as_yaml(found))
    hardware = load_hardware(str(tmp_path / "here.yaml"))
    assert hardware.name == "here"
    assert not hardware.overlaps
    assert (hardware.price, hardware.link) == (0.25, 2e9)
    assert [line.split(":")[0] for line in lines] == list(script.MEASURED)
    for name in script.MEASURED:
        assert getattr(hardware, name) == pytest.approx(found[name], rel=1e-3)
    assert 1e8 < hardware.matrix_fp32 < 1e15
    assert 1e7 < hardware.memory < 1e13
    assert 1e-8 < hardware.call < 1e-2


def test_the_script_says_what_it_takes(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["measure_hardware.py"])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
