"""What `hydra/launcher=slurm` asks of SLURM: the settings of a sweep's jobs, and their checks."""

from dataclasses import dataclass, fields
from typing import Any

GROUP = "hydra/launcher"
PREFIX = "hydra.launcher."
OURS = {
    "array": "", "error": "", "gpus-per-task": "each task would see one GPU while its local index counts on. ",
    "open-mode": "", "output": "", "requeue": "", "signal": "",
}  # fmt: skip
"""Options of sbatch that are not the user's, and why, where the reason is not that this program sets them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmLauncher:
    """What each job of a sweep gets, and how the sweep is submitted."""

    partition: str | None
    """Partition; null is the cluster's default."""
    account: str | None
    """Account that pays; null is the user's default."""
    hours: float
    """Time limit of a job; a run that needs longer saves, and its job goes back into the queue."""
    nodes: int
    """Nodes of a job."""
    gpus: int
    """GPUs a node, each with a task of its own; 0 is one task a node, on CPUs."""
    cpus_per_task: int
    """CPU cores of each task."""
    memory_gb: float | None
    """Memory a node; null is the partition's default."""
    signal_seconds: int
    """Seconds before the time limit at which a run is told to save; enough to write a checkpoint."""
    max_parallel: int | None
    """Jobs of the sweep that may run at once; null is all of them."""
    extra: dict[str, Any]
    """Further options of sbatch, as in {qos: high, constraint: h100}."""
    wait: bool
    """Whether to stay until all jobs have ended, and tell how; false submits and returns."""
    submit: bool
    """Whether to submit; false only writes the sweep's directory, for slurm/sweep.sbatch."""

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus)

    def problems(self) -> list[str]:
        """Return what is wrong with the values."""
        found = [
            f"{PREFIX}{key}={getattr(self, key)}: must be at least {least}."
            for key, least in (("nodes", 1), ("cpus_per_task", 1), ("gpus", 0), ("signal_seconds", 1),
                               ("max_parallel", 1))
            if getattr(self, key) is not None and getattr(self, key) < least
        ]  # fmt: skip
        for key in ("hours", "memory_gb"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                found.append(f"{PREFIX}{key}={getattr(self, key):g}: must be positive.")
        if 0 < self.hours * 3600 <= self.signal_seconds:
            found.append(
                f"{PREFIX}signal_seconds={self.signal_seconds}: not before the end of {PREFIX}hours={self.hours:g}. "
                "Lower it or raise hours."
            )
        for key in self.extra:
            name = key.replace("_", "-")
            if name in OURS:
                found.append(f"{PREFIX}extra.{key}: {OURS[name] or 'this program sets it itself. '}Remove it.")
            elif key in LAUNCHER_KEYS:
                found.append(f"{PREFIX}extra.{key}: has a key of its own. Write {PREFIX}{key}=...")
        return found


LAUNCHER_KEYS = [field.name for field in fields(SlurmLauncher)]
