"""A sweep of real runs: each point its own directory, on one process and on two."""

from pathlib import Path

import pytest
from conftest import Command


def runs_of(folder: Path) -> list[str]:
    return sorted(path.parent.name.rpartition("-")[0] for path in (folder / "runs").glob("*/summary.json"))


def expected(*names: str) -> list[str]:
    return sorted(f"bundled.residual2.{name}.f256.s0" for name in names)


@pytest.mark.slow
def test_each_point_is_a_run_and_the_same_command_finds_them_finished(
    command: Command, tiny: list[str], tmp_path: Path
) -> None:
    typed = ["-m", *(text for text in tiny if not text.startswith("k=")), "k=8,4", "sparsifier=topk,batch_topk"]
    outcome = command(*typed)
    assert outcome.status == 0, outcome.stderr
    assert "run 4 of 4 (k=4 sparsifier=batch_topk)" in outcome.stderr
    assert runs_of(tmp_path) == expected("topk.k8", "topk.k4", "mutual_choice.k8", "mutual_choice.k4")
    assert command(*typed).stdout.count("already finished") == 4


@pytest.mark.slow
@pytest.mark.multirank
def test_two_processes_make_one_run_after_another(torchrun: Command, tiny: list[str], tmp_path: Path) -> None:
    outcome = torchrun(2, "-m", *(text for text in tiny if not text.startswith("k=")), "k=8,4")
    assert outcome.status == 0, outcome.stderr
    assert runs_of(tmp_path) == expected("mutual_choice.k8", "mutual_choice.k4")
