"""The rank of this process, from the variables of its launcher: torchrun, else submitit, else SLURM, else alone.

No import of this module leads to torch, so that one rank can report an error before anything heavy is loaded.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from sae_train.errors import ConfigError

FIRST_PORT, N_PORTS = 20_000, 12_000  # below 32768, where Linux takes ports for outgoing connections


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """This process among the processes of a run. `this_process` creates it; whatever must know its rank reads it.

    Attributes:
        rank: index of the process, from 0.
        local_rank: index among the processes of its node.
        size: number of processes.
        local_size: number of processes on its node.
        launcher: 'torchrun' (or accelerate), 'submitit', 'slurm', or '' for a single process.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    launcher: str

    def export(self) -> None:
        """Set the variables that accelerate and torch read, and the rendezvous address where none is set."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.size),
            LOCAL_WORLD_SIZE=str(self.local_size),
        )
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_node(os.environ)
        if "MASTER_PORT" not in os.environ:
            job = int(os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID") or 0)
            step = int(os.environ.get("SLURM_STEP_ID", "0"))
            os.environ["MASTER_PORT"] = str(FIRST_PORT + (job + 997 * step) % N_PORTS)


def this_process(environment: Mapping[str, str] = os.environ) -> ProcessInfo:
    """Return the rank of this process and the number of processes.

    The shell of an sbatch script has SLURM_PROCID, too, so only a step of several tasks counts as ranks.
    """

    def number(name: str, default: int) -> int:
        return int(environment.get(name) or default)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        size = number("WORLD_SIZE", 1)
        return ProcessInfo(
            number("RANK", 0), number("LOCAL_RANK", 0), size, number("LOCAL_WORLD_SIZE", size), "torchrun"
        )
    if "SUBMITIT_LOCAL_GLOBALID" in environment:
        size = number("SUBMITIT_LOCAL_NTASKS", 1)
        return ProcessInfo(
            number("SUBMITIT_LOCAL_GLOBALID", 0), number("SUBMITIT_LOCAL_LOCALID", 0), size, size, "submitit"
        )
    size = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
    if size > 1 and "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        on_nodes = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE") or str(size))
        local_size = on_nodes[number("SLURM_NODEID", 0)]
        return ProcessInfo(number("SLURM_PROCID", 0), number("SLURM_LOCALID", 0), size, local_size, "slurm")
    return ProcessInfo(0, 0, 1, 1, "")


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node. SLURM's `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.rstrip(")") or 1)
    return counts


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the SLURM job of this process, as `squeue` and `scontrol` name it; None outside of SLURM.

    A task of an array is `array_index`, because the number of the array's last task also names the whole array.
    """
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def _first_node(environment: Mapping[str, str]) -> str:
    """Return the address at which SLURM reaches the node of rank 0; the local address where there is one node."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    alone = (environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES")) == "1"
    if not nodes or alone or shutil.which("scontrol") is None:
        return "127.0.0.1"
    first = _asked("scontrol", "show", "hostnames", nodes).split()[0]
    facts = _asked("scontrol", "--oneliner", "show", "node", first)
    address = [word.removeprefix("NodeAddr=") for word in facts.split() if word.startswith("NodeAddr=")]
    return address[0] if address else first


def _asked(*command: str) -> str:
    """Return the output of a command of SLURM."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"`{' '.join(command)}` failed, so where rank 0 is could not be found: {error}. Set MASTER_ADDR to its "
            "node, the same for all ranks."
        ) from error
