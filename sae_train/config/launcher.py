"""Settings of `hydra/launcher=slurm`: the SLURM jobs of a sweep."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

from sae_train.config.ranges import Range, Settings

GROUP = "hydra/launcher"
PREFIX = "hydra.launcher."
OURS = {
    "array": "", "error": "", "gpus-per-task": "each task would see one GPU while its local index counts on. ",
    "open-mode": "", "output": "", "requeue": "", "signal": "",
}  # fmt: skip
"""Options of sbatch that this program sets, with the reason where there is another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmLauncher(Settings):
    """The resources of each job of a sweep, and how the sweep is submitted."""

    partition: str | None
    """Partition. Default: the cluster's."""
    account: str | None
    """Account that pays. Default: the user's."""
    hours: Annotated[float, Range(above=0)]
    """Time limit of a job, in hours. A run that needs longer saves, and its job goes back into the queue."""
    nodes: Annotated[int, Range(at_least=1)]
    """Nodes of a job."""
    gpus: Annotated[int, Range(at_least=0)]
    """GPUs a node, each with its own task. 0 gives one task a node, on CPUs."""
    cpus_per_task: Annotated[int, Range(at_least=1)]
    """CPU cores of each task."""
    memory_gb: Annotated[float | None, Range(above=0)]
    """Memory a node, in GB. Default: the partition's."""
    signal_seconds: Annotated[int, Range(at_least=1)]
    """Seconds before the time limit at which a run is told to save. Allow enough to write a checkpoint."""
    max_parallel: Annotated[int | None, Range(at_least=1)]
    """Jobs of the sweep that may run at once. Default: all of them."""
    extra: dict[str, Any]
    """Further options of sbatch, as in {qos: high, constraint: h100}."""
    wait: bool
    """Stay until all jobs have ended, and report each. false submits and returns."""
    submit: bool
    """Submit the jobs. false only writes the sweep's directory, for slurm/sweep.sbatch."""

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus)

    def conflicts(self) -> list[str]:
        found = []
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
