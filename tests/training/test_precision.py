"""Which precision a run has, and what it says where another machine goes on with it."""

from pathlib import Path

import pytest
import torch

from sae_train.kernels import backend
from sae_train.ranks.interface import Solo
from sae_train.training import resume_notices
from sae_train.training.provenance import device_notices, processor, resolve_precision
from tools import grid_world as world

CPU = torch.device("cpu")


@pytest.mark.parametrize(("amx", "expected"), [(True, "bf16"), (False, "float32")])
def test_auto_is_bf16_on_a_processor_with_amx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amx: bool, expected: str
) -> None:
    world.write_activations(tmp_path)
    config = world.config_of(tmp_path, [], precision="auto")
    monkeypatch.setattr(backend, "has_amx", lambda: amx)
    assert resolve_precision(config.precision, stored=None, device=CPU) == expected
    kept = {"config": {"precision": "bf16"}}
    assert resolve_precision(config.precision, stored=kept, device=CPU) == "bf16", "what a run began with"


def test_flags_of_the_processor_decide() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        pytest.skip("no flags to compare with")
    assert backend.has_amx() == ("amx_bf16" in flags.read_text(errors="replace"))


def test_bf16_without_amx_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, n_lines in ((True, 0), (False, 1)):
        monkeypatch.setattr(backend, "has_amx", lambda amx=amx: amx)
        said = device_notices(CPU, precision="bf16", asked="bf16")
        assert len(said) == n_lines
        assert all("no AMX" in line and "\n" not in line for line in said)
        assert device_notices(CPU, precision="float32", asked="auto") == []


def test_another_processor_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"threads": 2, "processor": processor(CPU), "precision": "bf16"}
    assert resume_notices.notices(now, now) == []
    said = resume_notices.notices(now | {"processor": "Intel (AVX512 with AMX)"}, now)
    assert len(said) == 1
    assert "on Intel (AVX512 with AMX) so far" in said[0]
    assert "in bf16, but not bit for bit" in said[0]


@pytest.mark.parametrize(("case", "is_approximate"), [("topk", True), ("mutual_choice", True), ("relu", False)])
def test_penalised_sparsifiers_read_fp32_pre_activations(tmp_path: Path, case: str, is_approximate: bool) -> None:
    """On a CPU a bf16 product only finds candidates, which serve selection alone."""
    world.write_activations(tmp_path)
    config = world.config_of(tmp_path, [f"sparsifier={case}"], precision="bf16")
    trainer = world.build(config, Solo())
    trainer.step(trainer.stream.batch(0))
    assert trainer.learners[0].is_approximate == is_approximate
