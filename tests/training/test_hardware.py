"""The table of hardware and files of the user: what they hold, what is refused, and seconds from counts."""

from collections.abc import Callable
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from sae_train.errors import ConfigError
from sae_train.training.hardware import Hardware, hardware_table, load_hardware
from sae_train.training.work import Work

NAMES = ("h100", "h200", "a100", "l40s", "cpu")
TABLE = yaml.safe_load((files("sae_train.conf") / "hardware.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_of_the_table_loads(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.name == name
    assert hardware.overlaps == (name != "cpu")
    assert hardware.resolved("auto") == ("float32" if name == "cpu" else "bf16")
    assert hardware.resolved("float64") == "float64"


def test_the_table_holds_these_machines() -> None:
    assert tuple(hardware_table()) == NAMES


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"plan.hardware=mi300x: no such hardware. Known: a100, cpu, h100, h200, l40s\."
    ):
        load_hardware("mi300x")
    with pytest.raises(ConfigError, match="Did you mean 'h100'"):
        load_hardware("h10")


def written(path: Path, **changes: object) -> str:
    values = {**TABLE["cpu"], **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value != "left out"}))
    return str(path)


def test_a_file_is_the_same_as_its_entry(tmp_path: Path) -> None:
    found = load_hardware(written(tmp_path / "mine.yaml"))
    assert found == replace(hardware_table()["cpu"], name="mine")


def test_numbers_that_yaml_takes_for_text_are_read(tmp_path: Path) -> None:
    assert load_hardware(written(tmp_path / "mine.yaml", memory="3e9")).memory == 3e9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": "left out", "order": "left out"}, "memory, order: missing."),
        ({"memory": -1}, "memory=-1: must be a number above 0."),
        ({"scan": "fast"}, "scan=fast: must be a number above 0."),
        ({"scan": True}, "scan=True: must be a number above 0."),
        ({"call": float("nan")}, "call=nan: must be a number above 0."),
        ({"link": float("inf")}, "link=inf: must be a number above 0."),
        ({"gather": None}, "gather=None: must be a number above 0."),
        ({"matrix_share": 2}, "matrix_share=2: must be a number above 0 and at most 1."),
        ({"kind": "tpu"}, "kind=tpu: no such value. Choose cpu or gpu."),
        ({"auto_precision": "fp8"}, "auto_precision=fp8: no such value. Choose bf16 or float32."),
        ({"memori": 1}, "memori: no such field. Did you mean 'memory'"),
    ],
)
def test_a_file_without_sense_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_hardware(written(tmp_path / "mine.yaml", **changes))
    assert f"plan.hardware={tmp_path}/mine.yaml: {said}" in str(caught.value)
    assert "scripts/measure_hardware.py" in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "", "3", "\x00"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"is not YAML|holds no keys with values"):
        load_hardware(str(tmp_path / "mine.yaml"))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_hardware(str(tmp_path / "none.yaml"))


def of_one(**rates: float) -> Hardware:
    """Return a CPU whose rates are all 1, but for those that are given."""
    ones = {field.name: 1.0 for field in fields(Hardware)}
    texts = {"name": "ones", "kind": "cpu", "auto_precision": "float32"}
    return Hardware(**{**ones, **texts, **rates})  # type: ignore[arg-type]


RATES: dict[str, Callable[[float], Hardware]] = {
    "operations": lambda rate: of_one(matrix_fp32=rate),
    "streamed": lambda rate: of_one(memory=rate),
    "scanned": lambda rate: of_one(scan=rate),
    "gathered": lambda rate: of_one(gather=rate),
    "ordered": lambda rate: of_one(order=rate),
    "listed": lambda rate: of_one(list=rate),
    "fresh": lambda rate: of_one(fresh=rate),
    "sent": lambda rate: of_one(link=rate),
    "calls": lambda rate: of_one(call=1 / rate),
}


@pytest.mark.parametrize("count", RATES)
def test_each_count_takes_its_rate(count: str) -> None:
    work = Work(**{count: 6.0})
    assert RATES[count](4.0).seconds(work, precision="float32") == 1.5
    assert (work + work.times(2)) == Work(**{count: 18.0})


def test_every_count_has_a_rate() -> None:
    assert set(RATES) == {field.name for field in fields(Work)}


def test_a_gpu_starts_operations_ahead() -> None:
    work, gpu = Work(streamed=5, calls=3), replace(of_one(), kind="gpu")
    assert of_one().seconds(work, precision="float32") == 8
    assert gpu.seconds(work, precision="float32") == 5
    assert gpu.seconds(Work(streamed=2, calls=3), precision="float32") == 3
