"""The memory of a run: how much there is, which tensors take the most, and which settings shrink them.

The plan refuses a run that cannot fit. Where memory runs out all the same, a message names the largest tensors.
"""

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from sae_train.config import LaneSizes
from sae_train.config.lanes import FORWARDS_A_POOL
from sae_train.errors import UserError
from sae_train.ranks.launcher_env import this_process

NAMED = 0.01
"""Share of a rank's memory above which a message names a holding."""
SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "bad_alloc",
    "could not create a primitive",
)
"""Texts of torch's RuntimeErrors where memory has run out: of its CPU allocator, CUDA, cuBLAS, C++ and oneDNN."""
ALWAYS = "always"
_CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class OutOfMemory(UserError):
    """Memory ran out while a run was built or trained."""


@dataclass(frozen=True, slots=True)
class Holding:
    """Tensors that a rank holds together, estimated. `MemoryModel` makes them for the plan."""

    what: str
    n_bytes: int
    knobs: tuple[str, ...]
    """Settings that shrink them."""
    phase: str = ALWAYS
    """When they are held: always, or only in a step or an evaluation. Those of two phases are never held together."""


def needed_bytes(held: Iterable[Holding]) -> int:
    """Return the memory of a rank: what it always holds, and the phase that adds the most."""
    total: dict[str, int] = {}
    for each in held:
        total[each.phase] = total.get(each.phase, 0) + each.n_bytes
    return total.pop(ALWAYS, 0) + max(total.values(), default=0)


def available_bytes() -> int:
    """Return the memory that this rank may take: its GPU's, else its part of the machine's or of a lower limit.

    Limits: of the process (`ulimit -v`), and of the control group that a container or a job was put into, where it is
    mounted at the root.
    """
    process = this_process()
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(process.local_rank).total_memory
    machine = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _CONTROL_GROUPS:
        try:
            machine.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or 'max'
            continue
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    share = min(machine) // process.local_size
    return share if own == resource.RLIM_INFINITY else min(share, own)


def largest(holdings: tuple[Holding, ...]) -> str:
    """Return a sentence with the largest holdings and their sizes, and one with the settings that shrink them."""
    least = NAMED * sum(each.n_bytes for each in holdings)
    found = sorted((each for each in holdings if each.n_bytes), key=lambda each: -each.n_bytes)
    found = [each for each in found if each.n_bytes > least]
    knobs = dict.fromkeys(knob for each in found for knob in each.knobs)
    sizes = "; ".join(f"{each.what} {gigabytes(each.n_bytes)}" for each in found)
    return f"Largest, estimated: {sizes}. What shrinks them: {', '.join(knobs)}."


def largest_pool(sizes: LaneSizes, *, batch_bytes: int, too_much: int) -> int | None:
    """Return the largest `harvest.pool_batches` that saves `too_much` bytes a rank, or None where no pool does.

    Args:
        sizes: the sizes of the harvest as they are.
        batch_bytes: memory of one batch in this rank's pools.
        too_much: bytes to save.
    """
    fits = sizes.pool_batches - -(-too_much // batch_bytes)
    least = max(2, -(-FORWARDS_A_POOL * sizes.forward_tokens // sizes.share))
    return fits if fits >= least else None


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e9:.3f} GB"


@contextmanager
def named_when_it_runs_out(holdings: tuple[Holding, ...]) -> Iterator[None]:
    """Turn errors of Python and torch about memory into a message that names the largest holdings.

    Raises:
        OutOfMemory: in place of those errors.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        _explain(error, holdings)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS):
            raise
        _explain(error, holdings)


def _explain(error: BaseException, holdings: tuple[Holding, ...]) -> NoReturn:
    said = next(iter(str(error).splitlines()), "").removesuffix(".")[:240]
    where = "the GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
    raise OutOfMemory(
        f"{where} ran out{f' ({said})' if said else ''}; this rank may take {gigabytes(available_bytes())} in all. "
        f"{largest(holdings)} The same command goes on from the last checkpoint, if there is one; with other settings "
        "it is another run."
    ) from error
