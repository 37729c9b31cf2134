"""Compute threads and their spinning follow from the usable cores, unless the user sets them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sae_train.cli.train import run_command
from sae_train.ranks.launcher_env import ProcessInfo
from sae_train.ranks.threads import SPINS, cgroup_quota, n_threads, prepare_threads
from tools.command_line import LAUNCHERS, QUIET
from tools.tiny_runs import rows_run

CORES = n_threads({})
ALONE = ProcessInfo(0, 0, 1, 1, "")


def test_what_is_typed_stays() -> None:
    for typed in ({"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}):
        environment = typed | {"OMP_NUM_THREADS": "3"}
        prepare_threads(environment)
        assert environment == typed | {"OMP_NUM_THREADS": "3"}
    environment = {"OMP_NUM_THREADS": "", "GOMP_SPINCOUNT": ""}
    prepare_threads(environment)
    spins = str(SPINS) if sys.platform == "linux" else ""
    assert environment == {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": spins}


def test_ranks_of_a_machine_share_its_cores_and_tasks_of_slurm_have_their_own() -> None:
    assert n_threads({}, process=ALONE) == CORES
    assert n_threads({}, process=ProcessInfo(0, 0, 64, 64, "slurm")) == 1
    a_task = {"SLURM_CPUS_PER_TASK": "1"}
    assert n_threads(a_task, process=ALONE) == 1
    for launcher in ("slurm", "submitit"):
        many = {"SLURM_CPUS_PER_TASK": "64"}
        assert n_threads(many, process=ProcessInfo(0, 0, 8, 8, launcher)) == CORES  # never more than it may run on
    assert n_threads({"SLURM_CPUS_PER_TASK": "64"}, process=ProcessInfo(0, 0, 64, 64, "torchrun")) == 1
    assert n_threads({"SLURM_CPUS_PER_TASK": "many"}, process=ALONE) == CORES


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_cpus_that_a_process_may_not_run_on_do_not_count() -> None:
    program = (
        "import os; from sae_train.ranks.threads import n_threads;"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(n_threads({}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def groups(folder: Path, lines: str, files: dict[str, str]) -> float | None:
    """Return the quota from files as Linux writes them."""
    (folder / "cgroup").write_text(lines)
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cgroup_quota(folder / "cgroup", folder / "mount")


V1 = "4:memory:/job\n3:cpu,cpuacct:/job/step\n2:cpuset:/\n0::/\n"
QUOTAS: dict[str, tuple[str, dict[str, str], float | None]] = {
    "version 2": ("0::/job/step\n", {"job/step/cpu.max": "150000 100000\n"}, 1.5),
    "a parent's": ("0::/job/step\n", {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "200000 100000\n"}, 2),
    "the least": ("0::/job/step\n", {"job/step/cpu.max": "300000 100000\n", "job/cpu.max": "50000 100000\n"}, 0.5),
    "a container's": ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
    "none": ("0::/job\n", {"job/cpu.max": "max 100000\n"}, None),
    "version 1": (V1, {"cpu/job/step/cpu.cfs_quota_us": "250000\n", "cpu/job/step/cpu.cfs_period_us": "100000\n"}, 2.5),
    "version 1, none": (V1, {"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, None),
    "version 1, a container's": (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    "garbage": ("what\n:\n0::/job\n", {"job/cpu.max": "\n"}, None),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_the_quota_of_a_control_group_counts(tmp_path: Path, case: str) -> None:
    lines, files, quota = QUOTAS[case]
    assert groups(tmp_path, lines, files) == quota


def test_no_control_groups_are_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path / "none", tmp_path) is None


def test_a_sweep_that_is_submitted_hands_nothing_of_this_machine_to_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    typed = ["-m", *rows_run(tmp_path), "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.submit=false"]
    assert run_command(typed) == 0
    assert not {"OMP_NUM_THREADS", "GOMP_SPINCOUNT"} & os.environ.keys()


POINT = "import sys; from sae_train.cli.train import run_point; run_point(sys.argv[1:], 'outcome.json')"
ENTRIES = {
    "python -m": [sys.executable, "-m", "sae_train"],
    "console script": [str(Path(sys.executable).parent / "sae-train")],
    "submitit": [sys.executable, "-c", POINT],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "sae_train",
    ],
}


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP is Linux's")
@pytest.mark.parametrize(
    "entry", [pytest.param(e, marks=[] if e == "python -m" else [pytest.mark.slow]) for e in ENTRIES]
)
def test_openmp_is_told_before_torch_loads_it(tmp_path: Path, entry: str) -> None:
    """OpenMP prints the settings that it has read."""
    variables = {key: value for key, value in os.environ.items() if key not in (*LAUNCHERS, *QUIET, "GOMP_SPINCOUNT")}
    variables |= {"OMP_DISPLAY_ENV": "verbose", "WANDB_MODE": "offline"}
    command = [*ENTRIES[entry], *rows_run(tmp_path), "dry_run=true"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True, timeout=120)
    said = re.findall(r"(OMP_NUM_THREADS|GOMP_SPINCOUNT) = '(.*)'", done.stderr)
    ranks, threads = (2, 1) if entry == "torchrun" else (1, CORES)
    assert said.count(("GOMP_SPINCOUNT", str(SPINS))) == ranks
    assert said[-2:] == [("OMP_NUM_THREADS", str(threads)), ("GOMP_SPINCOUNT", str(SPINS))] or entry == "torchrun"
    assert said.count(("OMP_NUM_THREADS", str(threads))) >= ranks
