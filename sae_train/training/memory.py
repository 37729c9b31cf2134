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

from sae_train.config import CheckpointConfig, LaneSizes, SourceConfig
from sae_train.config.lanes import FORWARDS_A_POOL
from sae_train.errors import ConfigError, UserError
from sae_train.harvest.build import StreamFacts
from sae_train.kernels import backend
from sae_train.ranks.launcher_env import this_process
from sae_train.sparsifiers import sparsifier_class
from sae_train.training.sae_plan import SaePlan

NAMED = 0.02
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
_CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class OutOfMemory(UserError):
    """Memory ran out while a run was built or trained."""


LEFT_TO_THE_MODEL = 0.2
"""Share of the memory that a plan with a language model leaves to it, because it is not counted."""


@dataclass(frozen=True, slots=True)
class Holding:
    """Tensors that a rank holds together, estimated. `holdings` makes them for the plan."""

    what: str
    n_bytes: int
    knobs: tuple[str, ...]
    """Settings that shrink them."""


def holdings(
    source: SourceConfig,
    saes: Iterable[SaePlan],
    facts: StreamFacts,
    *,
    n_ranks: int,
    columns: int,
    copies_checkpoints: bool,
) -> tuple[Holding, ...]:
    """Return the largest tensors of one rank, estimated.

    A step's matrices as large as its pre-activations, and the logits of a loss whose gradient is harvested, count both
    where a batch is harvested during a step. Else they follow each other, and the larger counts.

    Args:
        columns: ranks that share the features of one copy of a dictionary.
        copies_checkpoints: see `copies_in_host_memory`.
    """
    saes = list(saes)
    element, batch_tokens = source.element_size, source.batch_tokens
    parameters = sum(sae.parameters for sae in saes)
    width = "n_features" if saes[0].config.n_features else "expansion"
    matrices = [(sparsifier_class(sae.config.sparsifier.name).matrices_held, sae.n_features) for sae in saes]
    held, widest = max(matrices, key=lambda pair: pair[0] * pair[1])
    step = held * element * batch_tokens * widest // n_ranks
    logits = facts.logit_bytes
    if not facts.prefetch:
        step, logits = (step, 0) if step >= logits else (0, logits)
    name = f"[{widest}, {saes[0].d_model}]"
    copied = (3 * element * parameters + facts.pool_bytes) // n_ranks if copies_checkpoints else 0
    rounds = source.precision == "bf16" or (source.precision == "auto" and _has_bf16())
    return (
        Holding(f"weights, gradients and two moments, 8 of {name}", 4 * element * parameters // columns,
                (f"lower {width}", "parallel=features over several ranks")),
        Holding(f"weights rounded to bf16, 2 of {name}", 2 * parameters // columns * rounds,
                (f"lower {width}",)),
        Holding(f"copies of weights and moments, 6 of {name}, and of pools while a checkpoint is written", copied,
                ("checkpoint.beside=false",)),
        Holding(f"pre-activations and what is as large, {held} of [{batch_tokens}, {widest}]"
                + (f" over {n_ranks} ranks" if n_ranks > 1 else ""), step,
                ("lower batch_tokens", f"lower {width}")),
        Holding("logits of the language model and the way back through them", logits,
                ("lower harvest.contexts_per_forward",)),
        Holding("pools", facts.pool_bytes // n_ranks, ("lower harvest.pool_batches", "lower batch_tokens")),
        Holding("activations harvested ahead", facts.ahead_bytes // n_ranks, ("lower harvest.prefetch",)),
    )  # fmt: skip


def copies_in_host_memory(checkpoint: CheckpointConfig) -> bool:
    """Return whether a checkpoint's copy takes this rank's memory. A GPU's state is copied to the host's memory."""
    return bool(checkpoint.beside) and not torch.cuda.is_available()


def _has_bf16() -> bool:
    return backend.has_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def check_memory(
    held: tuple[Holding, ...],
    source: SourceConfig,
    facts: StreamFacts,
    saes: Iterable[SaePlan],
    *,
    n_ranks: int,
    pool_copies: int,
) -> None:
    """Refuse holdings that cannot fit in this rank's memory, and name the largest pools that would fit.

    Args:
        pool_copies: how often a rank holds its pools, with the copy for a checkpoint.

    Raises:
        ConfigError: they do not fit.
    """
    needed, sizes = sum(each.n_bytes for each in held), facts.sizes
    available = int(available_bytes() * (1 - LEFT_TO_THE_MODEL if sizes else 1))
    if needed <= available:
        return
    n_features = max(sae.n_features for sae in saes)
    given, way_out = f"n_features={n_features}, batch_tokens={source.batch_tokens}:", ""
    batch_bytes = pool_copies * facts.pool_batch_bytes // n_ranks
    fits = sizes and largest_pool(sizes, batch_bytes=batch_bytes, too_much=needed - available)
    if sizes and fits:
        pools = gigabytes(facts.pool_bytes // n_ranks)
        given = f"harvest.pool_batches={sizes.pool_batches}: with pools of {pools} this"
        way_out = f"Largest that fits: {fits}. "
    raise ConfigError(
        f"{given} needs about {gigabytes(needed)} a rank, and there are {gigabytes(available)} for each"
        f"{' beside the language model' if sizes else ''}. "
        f"{way_out}{largest(held)}"
    )


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
