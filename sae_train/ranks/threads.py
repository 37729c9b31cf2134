"""The number of compute threads of a process, and how long they spin while they wait.

Both are environment variables that must be set before torch is loaded, because GNU's OpenMP, which torch is linked to
on Linux, reads them then. Its threads spin for milliseconds between two operations. On a crowded machine this takes
cores from other processes. No import of this module leads to torch.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from sae_train.ranks.launcher_env import ProcessInfo, this_process

SPINS = 500
"""Rounds of the loop in which a thread waits for work before it sleeps (docs/performance.md)."""
TYPED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables with which a user decides how threads wait."""
CGROUPS = Path("/sys/fs/cgroup")
TOPOLOGY = Path("/sys/devices/system/cpu")


def prepare_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the number of threads and, on Linux, their spinning, unless the user did. Call before torch is imported."""
    if sys.platform == "linux" and not any(environment.get(name) for name in TYPED):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
    if not environment.get("OMP_NUM_THREADS"):
        environment["OMP_NUM_THREADS"] = str(n_threads(environment))


@contextmanager
def borrowed_threads() -> Iterator[None]:
    """Compute inside the block with as many threads as the command would, and put the process's own number back.

    `sae_train.train` uses it: sums depend on the number of threads, so its results equal the command's. The
    environment is the same before and after. Where torch is not loaded yet, it is loaded with the command's settings.
    """
    before = {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    prepare_threads()
    typed = os.environ["OMP_NUM_THREADS"].partition(",")[0]  # OpenMP takes a number for each nesting level
    try:
        import torch
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    n_before = torch.get_num_threads()
    torch.set_num_threads(int(typed) if typed.isdecimal() and int(typed) else n_threads())
    try:
        yield
    finally:
        torch.set_num_threads(n_before)


def n_threads(environment: Mapping[str, str] = os.environ, *, process: ProcessInfo | None = None) -> int:
    """Return the number of compute threads of this rank: one for each physical core that it may use.

    A rank may use the CPUs of its affinity, up to the quota of its control group and up to SLURM's CPUs a task. Ranks
    of one machine share these, unless each is a SLURM task with its own CPUs.
    """
    process = process or this_process(environment)
    cores = len(_physical_cores(_affinity()))
    quota = cgroup_quota()
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    a_task = environment.get("SLURM_CPUS_PER_TASK", "")
    if a_task.isdecimal() and int(a_task) > 0:
        cores = min(cores, int(a_task))
        if process.launcher in ("slurm", "submitit"):
            return cores
    return max(1, cores // process.local_size)


def _affinity() -> set[int]:
    """Return the CPUs of this process's affinity."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int]) -> set[str]:
    """Return the cores of these CPUs. Two hardware threads of one core multiply no faster than one."""
    return {_siblings(cpu) for cpu in cpus}


def _siblings(cpu: int) -> str:
    """Return Linux's list of the CPUs that share a core with `cpu`, or `cpu` where there is no such list."""
    try:
        return (TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip() or str(cpu)
    except OSError:
        return str(cpu)


def cgroup_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = CGROUPS) -> float | None:
    """Return the smallest CPU quota of this process's control groups and their parents; None without a quota.

    Args:
        groups: the file in which Linux lists the groups.
        root: the mount of version 2; version 1 is in `cpu` below it.
    """
    try:
        lines = groups.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found: list[float] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            found += _quotas(root, path, _quota_v2)
        elif "cpu" in controllers.split(","):
            found += _quotas(root / "cpu", path, _quota_v1)
    return min(found, default=None)


def _quotas(mount: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    """Return the quotas of a group and of all its parents. A container may see its own group as the mount itself."""
    parts = [part for part in path.split("/") if part and part != ".."]
    folders = [mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return [quota for folder in folders if (quota := read(folder)) is not None]


def _quota_v2(folder: Path) -> float | None:
    """Return the CPUs that `cpu.max` allows. It holds microseconds a period, such as `150000 100000`, or `max`."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period) if quota != "max" else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    """Return the CPUs that `cpu.cfs_quota_us` and `cpu.cfs_period_us` allow; a negative quota sets no limit."""
    try:
        quota, period = (
            int((folder / name).read_text(encoding="ascii")) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
