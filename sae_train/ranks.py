"""Who am I among the processes of this run, and the few things they say to each other.

The only file that speaks to torch.distributed and accelerate. Algorithms receive a `Ranks` value and call its
verbs; `Solo` is the one-process twin whose verbs are the identity, so no algorithm asks whether it is
distributed. Every verb is a collective: all ranks call it in the same order with equal shapes and dtypes.
"""

import os
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from sae_train.errors import UserError


class Ranks(ABC):
    """The processes of a run, seen from one of them.

    Attributes:
        rank: index of this process, from 0.
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    @abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of `tensor` (any shape, int or float); the argument is left alone."""

    @abstractmethod
    def sum_in_place(self, tensor: Tensor) -> None:
        """Replace a contiguous `tensor` by its sum over ranks (gradients: no second copy)."""

    @abstractmethod
    def max(self, tensor: Tensor) -> Tensor:
        """Return the elementwise maximum over ranks of `tensor`."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor:
        """Return all ranks' `tensor` stacked in rank order: [size, *tensor.shape]."""

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable `value`, in rank order. Host side and slow: never in a step."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called this."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; the last call of a run that ended well."""

    def raise_together(self, problem: UserError | None) -> None:
        """Raise on every rank what any rank ran into; the first in rank order wins. Host side, as gather_objects."""
        for found in self.gather_objects(problem):
            if found is not None:
                raise found

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return all ranks' rows concatenated in rank order; ranks may hold different numbers of rows."""
        counts = [int(n) for n in self.gather(torch.tensor([len(rows)], device=rows.device)).flatten()]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self.gather(padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class Solo(Ranks):
    """One process: every verb is the identity."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = 0, 1, torch.device(device)

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum_in_place(self, tensor: Tensor) -> None:
        return None

    def max(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0)

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        return None

    def close(self) -> None:
        return None


class Processes(Ranks):
    """Several processes, through accelerate's state and torch.distributed's collectives."""

    def __init__(self) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.size = self._state.process_index, self._state.num_processes
        self.device = self._state.device

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        self.sum_in_place(total)
        return total

    def sum_in_place(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    def max(self, tensor: Tensor) -> Tensor:
        largest = tensor.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest

    def gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self._state.wait_for_everyone()

    def close(self) -> None:
        self.barrier()  # a rank that leaves while another still speaks makes that one abort
        self._state.destroy_process_group()


def process_count() -> int:
    """Return how many processes the launcher started (torchrun, accelerate, else SLURM); 1 when alone."""
    _export_slurm()
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """Return this process's index as the launcher gave it; 0 when alone."""
    _export_slurm()
    return int(os.environ.get("RANK", "0"))


def _export_slurm() -> None:
    """Give srun's place the names that torchrun uses; torchrun's own come first.

    An sbatch script's shell also carries SLURM_PROCID, so a step of one task stays alone.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) < 2 or "SLURM_STEP_ID" not in os.environ:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]


def find_ranks() -> Ranks:
    """Join the processes that the launcher started, or be alone; picks the device (CUDA where there is one)."""
    if process_count() > 1:
        if not torch.cuda.is_available():
            os.environ.setdefault("ACCELERATE_USE_CPU", "1")
        return Processes()
    return Solo("cuda" if torch.cuda.is_available() else "cpu")
