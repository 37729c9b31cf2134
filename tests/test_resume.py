"""Killed at any moment, any number of times, a run ends where it would have ended: bit for bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import LAUNCHERS, QUIET, Command, Outcome, changed, rows_run, tiny_run


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


MORE = [
    "checkpoint.every_tokens=1024",
    "log_every=1024",
    "evaluate_every=4096",
    "aux_loss=aux_zipf",
    "dead_window=2048",
]


def run_directory(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without what depends on the clock."""
    lines = (run_directory(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def weights(folder: Path) -> bytes:
    (file,) = run_directory(folder).glob("saes/*/sae.safetensors")
    return file.read_bytes()


def launch(
    folder: Path, n_ranks: int, arguments: list[str], variables: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Start a run on so many ranks; `variables` are in the environment of the ranks, not in torchrun's."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHERS} | QUIET | {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    launcher = [*launcher, "--nproc-per-node", str(n_ranks)] if n_ranks > 1 else []
    added = ["env", *(f"{name}={value}" for name, value in (variables or {}).items())] if variables else []
    run = [sys.executable, "-m", "sae_train", *changed(tiny_run(folder), *MORE, *arguments)]
    return subprocess.Popen(
        [*launcher, *added, *run],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> Outcome:
    text, _ = process.communicate(timeout=300)
    return Outcome(process.returncode, text, "")


def checkpoints(folder: Path) -> list[str]:
    found = (folder / "runs").glob("*/checkpoints/step_*")
    return sorted(path.name for path in found)


def workers(process: "subprocess.Popen[str]") -> list[int]:
    """Return the process ids of torchrun's ranks, in rank order; each leads a session of its own."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            named = [text for text in variables if text.startswith(b"RANK=")]
            if named:
                found[int(named[0].removeprefix(b"RANK="))] = int(child)
    return [found[rank] for rank in sorted(found)]


def kill_after_progress(process: "subprocess.Popen[str]", folder: Path, chance: random.Random) -> bool:
    """kill -9 all processes a random moment after the next checkpoint appears; False if the run finished first."""
    before = checkpoints(folder)
    deadline = time.monotonic() + 240
    while checkpoints(folder) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.3))
    if process.poll() is not None:
        return False
    for killed in workers(process):
        os.kill(killed, signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    return True


@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=[pytest.mark.multirank, pytest.mark.slow])])
@pytest.mark.parametrize(
    "arguments",
    [
        ["sparsifier=mutual_choice"],
        ["checkpoint.beside=true"],
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
    newest = run_directory(torn) / "checkpoints" / checkpoints(torn)[-1] / "replicated.safetensors"
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
    before = {path: path.read_bytes() for path in kept.rglob("*.*")}
    done = command(*arguments, "name=other", "seed=3")
    assert done.status == 2
    assert "made by another run (identity " in done.stderr
    assert "Take it away, or choose another name=." in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {path: path.read_bytes() for path in kept.rglob("*.*")}


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
        (
            {"NUMBA_DISABLE_JIT": "1"},
            "this run computed with compiled kernels so far and now lacks them: it goes on, but",
        ),
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
