"""The shipped scripts and the launcher on a real SLURM: ranks over nodes, sweeps, preemption, cancelling."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_train.sweeps.directory import SweepDirectory
from sae_train.sweeps.outcome import read_outcome
from tools.command_line import LAUNCHERS, QUIET, Command, Outcome, changed
from tools.slurm_cluster import Cluster, reason_to_skip

ROOT = Path(__file__).resolve().parents[2]
ONE_TASK = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
"""Options of sbatch for machines without GPUs."""
LAUNCHER = ["-m", "hydra/launcher=slurm", "hydra.launcher.gpus=0", "hydra.launcher.cpus_per_task=1"]

pytestmark = [pytest.mark.slow, pytest.mark.multirank]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := reason_to_skip():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        made = Cluster(Path(folder))
        made.environment |= QUIET | {"OMP_NUM_THREADS": "1"}
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(autouse=True)
def _outside_of_any_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHERS, "SAE_TRAIN_OUTCOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tensors(tmp_path: Path) -> list[str]:
    """Return the overrides of a sweep over four directories of activations, one of which has a row of NaN."""
    for number, name in enumerate("abcd"):
        rows = torch.randn(6000, 16, generator=torch.Generator().manual_seed(number))
        if name == "c":
            rows[1234] = torch.nan
        write(tmp_path / name, rows)
    paths = ",".join(str(tmp_path / name) for name in "abcd")
    return [
        "harvest=tensors", f"harvest.path={paths}", "n_features=64", "k=4", "tokens=4096", "batch_tokens=256",
        "evaluation_tokens=512", "log_every=1024", "tracking=none", f"runs={tmp_path / 'runs'}",
    ]  # fmt: skip


def write(folder: Path, rows: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"activations": rows}, folder / "part.safetensors")


def table(directory: Path, cluster: Cluster) -> list[str]:
    """Return the lines that sweep_status.py prints."""
    command = [sys.executable, str(ROOT / "scripts" / "sweep_status.py"), str(directory)]
    return subprocess.run(
        command, env={**os.environ, **cluster.environment}, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics without measured times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in lines]


def exported(run: Path) -> bytes:
    return only(run, "saes/*/sae.safetensors").read_bytes()


def has_logged(runs: Path) -> bool:
    """Return whether a run below `runs` is in the middle of its training."""
    return any(len(path.read_text().splitlines()) > 2 for path in runs.glob("*/metrics.jsonl"))


def long(tiny: list[str], runs: Path) -> list[str]:
    """Return the overrides of a run that is long enough to be interrupted."""
    return changed(tiny, "tokens=65536", f"runs={runs}")


def test_each_task_finds_its_rank(cluster: Cluster, tmp_path: Path) -> None:
    program = (
        "import os; from sae_train.ranks.launcher_env import this_process; p = this_process(); p.export(); "
        "print(p.rank, p.local_rank, p.size, p.local_size, os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'])"
    )
    said = cluster.ask("srun", "--nodes=2", "--ntasks=3", "python", "-c", program).split("\n")
    (port,) = {line.split()[-1] for line in said if line}
    assert sorted(said[:-1]) == [f"0 0 3 2 127.0.0.1 {port}", f"1 1 3 2 127.0.0.1 {port}", f"2 0 3 1 127.0.0.1 {port}"]


def test_two_nodes_make_one_run_to_its_end(cluster: Cluster, tiny: list[str], tmp_path: Path) -> None:
    job = cluster.submit("--nodes=2", *ONE_TASK, str(ROOT / "slurm" / "train.sbatch"), *tiny, cwd=tmp_path)
    facts = cluster.wait(job)
    said = (tmp_path / f"slurm-{job}.out").read_text()
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert only(tmp_path, "runs/*/summary.json").exists()
    again = cluster.submit("--nodes=2", *ONE_TASK, str(ROOT / "slurm" / "train.sbatch"), *tiny, cwd=tmp_path)
    assert cluster.wait(again)["ExitCode"] == "0:0"
    assert (tmp_path / f"slurm-{again}.out").read_text().count("already finished") == 1


def test_a_sweep_with_a_bad_point_and_its_resubmission(
    cluster: Cluster, command: Command, tensors: list[str], tmp_path: Path
) -> None:
    outcome = command(*LAUNCHER, *tensors, **cluster.environment)
    assert outcome.status == 2, outcome
    sweep = only(tmp_path, "runs/sweep-*")
    lines = table(sweep, cluster)
    assert [line.split()[1] for line in lines[1:5]] == ["done", "done", "failed", "done"], lines
    assert "not finite" in lines[3]
    assert lines[5] == "done 3, failed 1"
    before = {path: path.read_bytes() for path in sweep.glob("outcomes/*.json")}

    write(tmp_path / "c", torch.randn(6000, 16, generator=torch.Generator().manual_seed(9)))
    outcome = command(*LAUNCHER, *tensors, **cluster.environment)
    assert outcome.status == 0, outcome
    assert (outcome.stdout.count("submitted as job"), outcome.stdout.count("done (job")) == (1, 4)
    assert table(sweep, cluster)[-1] == "done 4"
    assert {path for path, text in before.items() if path.read_bytes() != text} == {sweep / "outcomes" / "0002.json"}
    assert not [line for line in cluster.ask("squeue", "--noheader").splitlines() if line]


def test_what_waits_in_the_queue_is_not_submitted_again(
    cluster: Cluster, command: Command, tensors: list[str], tmp_path: Path
) -> None:
    held = [*LAUNCHER, "hydra.launcher.wait=false", "hydra.launcher.extra={hold: true}", *tensors]
    assert command(*held, **cluster.environment).stdout.count("submitted as job") == 4
    outcome = command(*held, **cluster.environment)
    assert outcome.status == 0
    assert (outcome.stdout.count("submitted as job"), outcome.stdout.count("waiting (job")) == (0, 4)
    assert table(only(tmp_path, "runs/sweep-*"), cluster)[-1] == "waiting 4"
    cluster.ask("scancel", "--user=root")
    assert "failed 4" in table(only(tmp_path, "runs/sweep-*"), cluster)[-1]


def test_a_sweep_as_one_array(cluster: Cluster, command: Command, tiny: list[str], tmp_path: Path) -> None:
    typed = [text for text in tiny if not text.startswith("k=")]
    made = command(*LAUNCHER, "hydra.launcher.submit=false", *typed, "k=4,8", "name=null")
    assert "--array=0-1" in made.stdout, made
    sweep = only(tmp_path, "runs/sweep-*")
    points = (sweep / "points.txt").read_text().splitlines()
    (sweep / "points.txt").write_text(f'{points[0]}\n{points[1].replace("name=null", "name=eight")} "data.seed=1"\n')
    job = cluster.submit(
        "--array=0-1", *ONE_TASK, str(ROOT / "slurm" / "sweep.sbatch"), str(sweep), "seed=3", cwd=tmp_path
    )
    cluster.wait(job)
    logs = {path.name: path.read_text() for path in tmp_path.glob("slurm-*.out")}
    assert table(sweep, cluster)[-1] == "done 2", logs
    assert sorted(state.job or "" for state in SweepDirectory(sweep).states()[0]) == [f"{job}_0", f"{job}_1"]
    assert (tmp_path / "runs" / "eight" / "summary.json").exists()
    missing = cluster.submit("--array=7", *ONE_TASK, str(ROOT / "slurm" / "sweep.sbatch"), str(sweep), cwd=tmp_path)
    assert cluster.wait(missing)["ExitCode"] == "2:0"


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tiny: list[str], tmp_path: Path) -> None:
    typed = long(tiny, tmp_path / "runs")
    job = cluster.submit(*ONE_TASK, str(ROOT / "slurm" / "train.sbatch"), *typed, cwd=tmp_path)
    cluster.wait_for(lambda: has_logged(tmp_path / "runs"), "the run did not get going")
    cluster.ask("scancel", job)
    facts = cluster.wait(job, hurry=False)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    run = only(tmp_path, "runs/*-*")
    assert not (run / "summary.json").exists()
    assert list(run.glob("checkpoints/step_*"))


def test_a_job_that_is_told_to_save_goes_back_into_the_queue_and_ends_the_same(
    cluster: Cluster, torchrun: Command, tiny: list[str], tmp_path: Path
) -> None:
    job = cluster.submit(
        "--nodes=2", *ONE_TASK, str(ROOT / "slurm" / "train.sbatch"), *long(tiny, tmp_path / "runs"), cwd=tmp_path
    )
    cluster.wait_for(lambda: has_logged(tmp_path / "runs"), "the run did not get going")
    cluster.ask("scancel", "--signal=USR2", job)
    facts = cluster.wait(job)
    said = (tmp_path / f"slurm-{job}.out").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said
    assert said.count("resuming at step") == 1
    same(only(tmp_path, "runs/*-*"), torchrun(2, *long(tiny, tmp_path / "whole")), tmp_path / "whole")


def test_a_submitted_point_that_is_told_to_save_goes_on_by_itself_and_ends_the_same(
    cluster: Cluster, command: Command, tiny: list[str], tmp_path: Path
) -> None:
    typed = [*LAUNCHER, "hydra.launcher.wait=false", *long(tiny, tmp_path / "runs")]
    outcome = command(*typed, **cluster.environment)
    assert outcome.status == 0, outcome
    sweep = only(tmp_path, "runs/sweep-*")
    (job,) = SweepDirectory(sweep).jobs().values()
    cluster.wait_for(lambda: has_logged(tmp_path / "runs"), "the run did not get going")
    cluster.ask("scancel", "--signal=USR2", job)
    facts = cluster.wait(job)
    logs = "\n".join(path.read_text() for path in sweep.glob("logs/*.out"))
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), logs
    recorded = read_outcome(sweep / "outcomes" / "0000.json")
    assert recorded is not None
    assert (recorded.state, recorded.restarts, recorded.job) == ("finished", 1, job)
    assert "resuming at step" in logs
    whole = command(*long(tiny, tmp_path / "whole"), OMP_NUM_THREADS="1")
    same(only(tmp_path, "runs/b*-*"), whole, tmp_path / "whole")


def same(run: Path, whole: Outcome, runs: Path) -> None:
    """Check that a run ended bit for bit as the uninterrupted one."""
    assert whole.status == 0, whole
    assert exported(run) == exported(only(runs, "*-*"))
    assert rows(run) == rows(only(runs, "*-*"))


STUB = """
import contextlib, os, signal, sys, threading, time
from pathlib import Path
from sae_train.training import signals

def signal_children():  # as SLURM may: it signals all processes of a job, once for the job and once for its step
    while True:
        for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)

threading.Thread(target=signal_children, daemon=True).start()
signals.listen()
print("restart", os.environ.get("SLURM_RESTART_COUNT", "0"), flush=True)
while os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and signals.wish() != signals.BOTH:
    time.sleep(0.1)
print("notice", signals.requeue(signals.wish()), flush=True)
"""


def test_told_to_save_and_then_ended_by_slurm(cluster: Cluster, tmp_path: Path) -> None:
    """A job whose save outlasts the time limit goes back into the queue. A cancelled job does not."""
    (tmp_path / "stub.py").write_text(STUB)
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun {sys.executable} {tmp_path}/stub.py\n")
    options = ["--ntasks=1", "--requeue", "--open-mode=append", "--signal=USR2@40"]
    late = cluster.submit(*options, "--time=1", str(script), cwd=tmp_path)
    cancelled = cluster.submit(*options, "--time=10", str(script), cwd=tmp_path)
    cluster.wait_for(lambda: (tmp_path / f"slurm-{cancelled}.out").exists(), "the job did not start")
    cluster.wait_for(lambda: "restart 0" in (tmp_path / f"slurm-{cancelled}.out").read_text(), "the stub did not start")
    cluster.ask("scancel", "--signal=USR2", cancelled)
    cluster.ask("scancel", cancelled)
    facts = cluster.wait(cancelled, hurry=False)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    facts = cluster.wait(late)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), (tmp_path / f"slurm-{late}.out").read_text()
