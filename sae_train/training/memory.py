"""What a run holds in memory: how much there is of it, what takes the most, and which settings shrink that.

Refused before the first step where it can be worked out, and said again where memory runs out all the same.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from sae_train.config.lanes import FORWARDS_A_POOL, LaneSizes
from sae_train.errors import UserError
from sae_train.ranks.launcher_env import this_process

NAMED = 0.02
"""Share of all from which on a holding is named in messages."""
SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "bad_alloc",
    "could not create a primitive",
)
"""What torch's RuntimeErrors say where memory has run out: its CPU allocator's, CUDA's, cuBLAS's, C++'s, oneDNN's."""
_CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class OutOfMemory(UserError):
    """Memory ran out while a run was built or trained."""


@dataclass(frozen=True, slots=True)
class Holding:
    """Tensors that a rank holds together, estimated."""

    what: str
    n_bytes: int
    knobs: tuple[str, ...]
    """What to do about it."""


def available_bytes() -> int:
    """Return the memory that this rank may take: of its GPU, else its share of the machine's, or of a lower limit.

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
    """Return a sentence with the largest holdings and their sizes, and one with what shrinks them."""
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
    """Turn what Python and torch raise where memory runs out into a message that names the largest holdings.

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
