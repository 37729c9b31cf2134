"""Killed at any moment, any number of times, a run ends where it would have ended: bit for bit."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from sae_train.training.checkpoint_files import digest_of_notes
from tools.command_line import Command, changed
from tools.processes import checkpoints, finish, kill_after_progress, launch, rows, run_directory, weights
from tools.tiny_runs import rows_run


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=[pytest.mark.multirank, pytest.mark.slow])])
@pytest.mark.parametrize(
    "arguments",
    [
        ["sparsifier=mutual_choice"],
        pytest.param(["checkpoint.beside=true"], marks=pytest.mark.slow),
        pytest.param(
            ["sparsifier=feature_choice", "budget=zipf", "sparsifier.after=0.5"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["sparsifier=gradient"], marks=pytest.mark.slow),
    ],
    ids=["mutual_choice", "written beside", "feature_choice", "gradient"],
)
def test_killed_runs_end_bitwise_alike(tmp_path: Path, n_ranks: int, arguments: list[str]) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    done = finish(launch(whole, n_ranks, arguments))
    assert done.status == 0, done.stdout
    chance, kills = random.Random(n_ranks), 0
    while kills < 3:
        if not kill_after_progress(launch(torn, n_ranks, arguments), torn, chance):
            break
        kills += 1
    last = finish(launch(torn, n_ranks, arguments))
    assert last.status == 0, last.stdout
    assert kills >= 2
    assert "resuming at step" in last.stdout or "already finished" in last.stdout
    assert weights(torn) == weights(whole)
    assert rows(torn) == rows(whole)
    kept = list((run_directory(torn) / "checkpoints").iterdir())
    assert len(kept) == 2  # checkpoint.keep, and nothing half-written


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_and_ends_alike(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    assert finish(launch(whole, 1, [])).status == 0
    assert kill_after_progress(launch(torn, 1, ["checkpoint.keep=0"]), torn, random.Random(0))
    assert kill_after_progress(launch(torn, 1, ["checkpoint.keep=0"]), torn, random.Random(1))
    newest = run_directory(torn) / "checkpoints" / checkpoints(torn)[-1] / "stream.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    done = finish(launch(torn, 1, []))  # another keep is another checkpoint policy, not another run
    assert done.status == 0, done.stdout
    assert "damaged" in done.stdout
    assert "Using the checkpoint before it" in done.stdout
    assert weights(torn) == weights(whole)
    assert rows(torn) == rows(whole)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, command: Command) -> None:
    """Of the same shapes even, as someone has who copies a directory to begin from there."""
    arguments = rows_run(tmp_path)
    for name, seed in (("one", "seed=0"), ("other", "seed=3")):
        assert command(*arguments, f"name={name}", seed).status == 0
    kept = tmp_path / "runs" / "other" / "checkpoints"
    shutil.rmtree(kept)
    (kept.parent / "summary.json").unlink()  # so that it has to be gone on with
    shutil.copytree(tmp_path / "runs" / "one" / "checkpoints", kept)
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    done = command(*arguments, "name=other", "seed=3")
    assert done.status == 2
    assert "made by another run (identity " in done.stderr
    assert "Take it away, or choose another name=." in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path, command: Command) -> None:
    arguments = [*rows_run(tmp_path), "name=mine"]
    assert command(*arguments).status == 0
    run = tmp_path / "runs" / "mine"
    (run / "summary.json").unlink()  # so that it has to be gone on with
    kept = run / "checkpoints"
    for path in kept.glob("*/checkpoint.json"):
        notes = json.loads(path.read_text())
        del notes["format"], notes["sha256"]
        path.write_text(json.dumps(notes | {"sha256": digest_of_notes(notes)}))
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    done = command(*arguments)
    assert done.status == 2
    assert "written by another version of sae-train" in done.stderr
    assert f"remove {kept} to start it over" in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}


def test_finished_is_skipped_and_another_identity_refused(tmp_path: Path, command: Command) -> None:
    arguments = [*rows_run(tmp_path), "name=mine"]
    assert command(*arguments).status == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    again = command(*arguments)
    assert again.status == 0
    assert again.stdout.startswith("already finished: mine: L0 ")
    other = command(*changed(arguments, "k=16", "seed=1"))
    assert other.status == 2
    assert "holds another run: k 4.0 -> 16.0, seed 0 -> 1" in other.stderr
    assert "Traceback" not in other.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [slow("empty"), slow("list"), "no_sae", slow("gone")])
def test_a_run_that_is_not_whole_is_finished_again(tmp_path: Path, command: Command, damage: str) -> None:
    arguments = [*rows_run(tmp_path), "name=mine"]
    assert command(*arguments).status == 0
    run = tmp_path / "runs" / "mine"
    before, lines = weights(tmp_path), rows(tmp_path)
    if damage == "no_sae":
        shutil.rmtree(run / "saes")
    elif damage == "gone":
        (run / "summary.json").unlink()
    else:
        (run / "summary.json").write_text("[]" if damage == "list" else "")
    done = command(*arguments)
    assert done.status == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert weights(tmp_path) == before
    assert rows(tmp_path) == lines
    assert command(*arguments).stdout.startswith("already finished")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ATEN_CPU_CAPABILITY": "default"}, "(DEFAULT): it goes on in float32, but not bit for bit"),
        ({"OMP_NUM_THREADS": "2"}, "this run computed with 1 threads so far and now has 2: it goes on, but"),
        ({}, None),
    ],
)
def test_what_computes_otherwise_than_before_is_said(
    tmp_path: Path, environment: dict[str, str], said: str | None
) -> None:
    assert kill_after_progress(launch(tmp_path, 1, []), tmp_path, random.Random(0))
    done = finish(launch(tmp_path, 1, [], environment))
    assert done.status == 0
    assert "resuming at step" in done.stdout
    assert ("not bit for bit" in done.stdout) == (said is not None)
    assert said is None or said in done.stdout
