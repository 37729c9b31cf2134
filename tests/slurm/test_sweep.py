"""Sweeps: a directory for each point, on one process and on two; launcher settings, outcomes and the status table."""

import fcntl
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from sae_train.cli.compose import compose_request
from sae_train.cli.train import run_command
from sae_train.sweeps.directory import SweepDirectory
from sae_train.sweeps.outcome import Outcome, Record, read_outcome
from tools.command_line import Command, changed
from tools.tiny_runs import rows_run

ROOT = Path(__file__).resolve().parents[2]
STATUS = ROOT / "scripts" / "sweep_status.py"


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


def recorded(path: Path) -> Outcome:
    outcome = read_outcome(path)
    assert outcome is not None
    return outcome


def test_a_run_keeps_the_file_of_its_outcome(command: Command, tmp_path: Path) -> None:
    path, arguments = tmp_path / "0000.json", rows_run(tmp_path)
    job = {"SAE_TRAIN_OUTCOME": str(path), "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}
    assert command(*arguments, **job).status == 0
    outcome = recorded(path)
    assert (outcome.state, outcome.status, outcome.message) == ("finished", 0, None)
    assert (outcome.job, outcome.restarts) == ("12", 2)
    assert outcome.run is not None
    assert (Path(outcome.run) / "summary.json").exists()

    assert command(*changed(arguments, "harvest.path=nowhere"), SAE_TRAIN_OUTCOME=str(path)).status == 2
    outcome = recorded(path)
    assert (outcome.state, outcome.status, outcome.job, outcome.restarts) == ("failed", 2, None, 0)
    assert "nowhere" in (outcome.message or "")

    assert command("kk=3", SAE_TRAIN_OUTCOME=str(path)).status == 2
    outcome = recorded(path)
    assert (outcome.state, outcome.message) == ("failed", "kk=3: no such key. Did you mean 'k'?")


def sweep_of(folder: Path, n: int) -> Path:
    """Return a sweep's directory of `n` points without outcomes and jobs."""
    return SweepDirectory.made(folder, [["n_features=64", f"k={k}", "name=of its own"] for k in range(1, n + 1)]).path


def outcome_of(sweep: Path, index: int, **values: object) -> None:
    whole = {"state": "running", "status": None, "message": None, "run": None, "job": None, "restarts": 0, "time": ""}
    (sweep / "outcomes" / f"{index:04d}.json").write_text(json.dumps(whole | values))


def test_the_table_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweep_of(tmp_path, 7)
    run = tmp_path / "run"
    (run / "saes" / "x").mkdir(parents=True)
    (run / "saes" / "x" / "sae.json").write_text("{}")
    (run / "summary.json").write_text('{"saes": {"x": {"l0": 1, "fvu": 1}}}')
    (run / "metrics.jsonl").write_text('{"tokens": 2048}\n{"tokens": 4096}\n{"tok')
    outcome_of(sweep, 0, state="finished", status=0, run=str(run))
    outcome_of(sweep, 1, state="finished", status=0, run=str(tmp_path / "gone"))
    outcome_of(sweep, 2, run=str(run), job="12_2")
    outcome_of(sweep, 3, state="failed", status=2, message="first\nlast line", job="12_3")
    outcome_of(sweep, 4, state="preempted", status=75, job="12_4")
    outcome_of(sweep, 5, state="stopped", status=3, message="the loss is nan")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    done = subprocess.run([sys.executable, STATUS, str(sweep)], capture_output=True, text=True, check=True)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["point", "state", "job", "tokens", "arguments", "note"]
    assert [line.split()[:5] for line in lines[1:8]] == [
        ["0", "done", "-", "4,096", "k=1"],
        ["1", "failed", "-", "-", "k=2"],
        ["2", "running", "12_2", "4,096", "k=3"],
        ["3", "failed", "12_3", "-", "k=4"],
        ["4", "preempted", "12_4", "-", "k=5"],
        ["5", "stopped", "-", "-", "k=6"],
        ["6", "waiting", "-", "-", "k=7"],
    ]
    assert lines[4].endswith("last line")
    assert "as they were recorded" in lines[-1]
    refused = subprocess.run([sys.executable, STATUS, str(run)], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.parametrize(
    ("queue", "state", "is_open"),
    [
        ({}, "failed", False),
        ({"12_0": "RUNNING"}, "running", True),
        ({"12_0": "PENDING"}, "waiting", True),
        (None, "running", True),
    ],
)
def test_what_runs_is_what_slurm_says_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: dict[str, str] | None, state: str, is_open: bool
) -> None:
    monkeypatch.setattr("sae_train.sweeps.directory.queued", lambda jobs: queue)
    sweep = sweep_of(tmp_path, 1)
    outcome_of(sweep, 0, job="12_0")
    ((point,), asked) = SweepDirectory(sweep).states()
    assert (point.state, point.is_open, asked) == (state, is_open, queue is not None)


def test_the_same_points_are_the_same_sweep_and_quotes_survive(tmp_path: Path) -> None:
    assert sweep_of(tmp_path, 2) == sweep_of(tmp_path, 2) != sweep_of(tmp_path, 3)
    assert SweepDirectory(sweep_of(tmp_path, 2)).arguments(1) == ["n_features=64", "k=2", "name=of its own"]


def test_a_job_that_finds_its_run_held_leaves_the_outcome_to_the_holder(tmp_path: Path, command: Command) -> None:
    """One point has two jobs, such as one of slurm/sweep.sbatch and one of the launcher."""
    outcome_file, arguments = tmp_path / "0000.json", [*rows_run(tmp_path), "name=mine"]
    of_holder = Outcome(state="running", status=None, message=None, run=str(tmp_path / "runs" / "mine"), job="12",
                        restarts=0, time="then")  # fmt: skip
    outcome_file.write_text(json.dumps(asdict(of_holder)))
    lock = tmp_path / "runs" / "mine" / ".lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = command(*arguments, SAE_TRAIN_OUTCOME=str(outcome_file), SLURM_JOB_ID="13")
        assert done.status == 2, done
        assert "another process is training in it" in done.stderr
        assert read_outcome(outcome_file) == of_holder
    assert Record({"SAE_TRAIN_OUTCOME": str(tmp_path / "other.json"), "SLURM_JOB_ID": "13"}).end(2, in_use=True) is None
    found = read_outcome(tmp_path / "other.json")  # a holder that keeps no file leaves the word to the refused one
    assert found is not None
    assert found.state == "failed"
    done = command(*changed(arguments, "k=400000"), SAE_TRAIN_OUTCOME=str(outcome_file), SLURM_JOB_ID="13")
    found = read_outcome(outcome_file)
    assert done.status == 2
    assert found is not None
    assert (found.state, found.job) == ("failed", "13")


NOT_HERE = (
    "hydra.launcher.nodes=2: without hydra/launcher=slurm the runs are made here, one after another, so this would "
    "change nothing. Add hydra/launcher=slurm or remove it."
)
SLURM = "-m hydra/launcher=slurm "
REFUSED = {
    "hydra/launcher=slurm": "hydra/launcher=slurm: sends the runs of a sweep, and this is one run. Add -m, or use "
    "slurm/train.sbatch.",
    "-m hydra/launcher=slrm": "hydra/launcher=slrm: no such launcher. Did you mean 'slurm'?",
    "-m hydra.launcher.nodes=2": NOT_HERE,
    "-m hydra/launcher=basic hydra.launcher.nodes=2": NOT_HERE,
    SLURM + "hydra.launcher.partitoin=gpu": "hydra.launcher.partitoin=gpu: no such key. Did you mean "
    "'hydra.launcher.partition'?",
    SLURM + "hydra.launcher.nodes=1,2": "hydra.launcher.nodes=1,2: one launcher submits the whole sweep.",
    SLURM + "hydra.launcher.gpus=1.5": "hydra.launcher.gpus=1.5: not a whole number.",
    SLURM + "hydra.launcher.hours=0": "hydra.launcher.hours=0: must be positive.",
    SLURM + "hydra.launcher.hours=0.05": "hydra.launcher.signal_seconds=180: not before the end of "
    "hydra.launcher.hours=0.05. Lower it or raise hours.",
    SLURM + "hydra.launcher.extra={signal:3}": "hydra.launcher.extra.signal: this program sets it itself. Remove it.",
    SLURM + "hydra.launcher.extra.nodes=3": "hydra.launcher.extra.nodes: has a key of its own. Write "
    "hydra.launcher.nodes=...",
    "-m +hydra/launcher=slurm": "+hydra/launcher=slurm: '+' cannot add keys here. Write hydra/launcher=slurm.",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_a_launcher_that_cannot_be_is_refused(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(typed.split()) == 2
    assert capsys.readouterr().err.splitlines() == [REFUSED[typed]]


def test_a_launcher_and_points_are_refused_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    typed = ["-m", "hydra/launcher=slurm", "hydra.launcher.nodes=0", "n_features=100", "k=8,400", f"runs={tmp_path}"]
    assert run_command(typed) == 2
    assert capsys.readouterr().err.splitlines() == [
        "hydra.launcher.nodes=0: must be at least 1.",
        "k=400: larger than n_features=100. Lower k or raise n_features.",
    ]
    assert list(tmp_path.iterdir()) == []


def test_what_the_launcher_lacks_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sae_train.sweeps.submit.find_spec", lambda name: None)
    assert run_command(["-m", "hydra/launcher=slurm", "k=8,16", f"runs={tmp_path / 'runs'}"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'sae-train[slurm]'" in said
    assert "no sbatch" in said
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "hydra" / "launcher"
    folder.mkdir(parents=True)
    text = (ROOT / "conf" / "hydra" / "launcher" / "slurm.yaml").read_text()
    (folder / "ours.yaml").write_text(text.replace("partition: null", "partition: gpu").replace("{}", "{qos: high}"))
    typed = ["hydra/launcher=ours", "hydra.launcher.hours=2", "hydra.launcher.extra.constraint=h100", "k=8,16"]
    request = compose_request(typed, sweep=True, config_dir=str(tmp_path))
    assert len(request.points) == 2
    assert not any("launcher" in text for point in request.points for text in point.overrides)
    assert request.launcher is not None
    assert (request.launcher.partition, request.launcher.hours) == ("gpu", 2)
    assert request.launcher.extra == {"qos": "high", "constraint": "h100"}
