"""The command line as the tests start it."""

from collections.abc import Callable
from typing import NamedTuple

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait take a busy machine from each other
}


LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


def changed(overrides: list[str], *more: str) -> list[str]:
    """Return `overrides` with those keys that `more` gives anew replaced: the command line refuses a key twice."""
    keys = {override.split("=")[0] for override in more}
    return [override for override in overrides if override.split("=")[0] not in keys] + list(more)
