"""The tensors that a rank holds, estimated by owner, and the refusal of a run that cannot fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sae_train.config import CheckpointConfig, ParallelConfig, SourceConfig
from sae_train.errors import ConfigError
from sae_train.harvest.build import StreamFacts
from sae_train.kernels import backend
from sae_train.ranks.layout import owners
from sae_train.sparsifiers import sparsifier_class
from sae_train.training.memory import Holding, gigabytes, largest, largest_pool, needed_bytes
from sae_train.training.sae_plan import SaePlan

FP32 = 4


def copies_in_host_memory(checkpoint: CheckpointConfig) -> bool:
    """Return whether a checkpoint's copy takes this rank's memory. A GPU's state is copied to the host's memory."""
    return bool(checkpoint.beside) and not torch.cuda.is_available()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """The rule that counts the tensors of a rank for any list of SAEs. `make_plan` creates it."""

    source: SourceConfig
    facts: StreamFacts
    parallel: ParallelConfig
    n_ranks: int
    columns: int
    """Ranks that share the features of one copy of a dictionary."""
    copies_checkpoints: bool
    """See `copies_in_host_memory`."""
    rounds: bool
    """Whether products take weights rounded to bf16."""

    def holdings(self, saes: Sequence[SaePlan]) -> tuple[Holding, ...]:
        """Return the largest tensors of one rank: of the one that holds the most, where SAEs live on one rank each."""
        where = owners({sae.name: sae.parameters for sae in saes}, parallel=self.parallel, n_ranks=self.n_ranks)
        if not where:
            return self._of_rank(saes, columns=self.columns, step_ranks=self.n_ranks)
        on_rank = [[sae for sae in saes if where[sae.name] == rank] for rank in sorted(set(where.values()))]
        each = [self._of_rank(some, columns=1, step_ranks=1) for some in on_rank]
        return max(each, key=needed_bytes, default=())

    def check(self, saes: Sequence[SaePlan], *, available: int, where: str) -> None:
        """Refuse SAEs that cannot fit, and name the number that would, or the largest pools.

        Args:
            saes: in the order given.
            available: bytes of memory that a rank may take.
            where: the place of the memory, for the message: 'for each', or 'on one h100'.

        Raises:
            ConfigError: they do not fit.
        """
        held = self.holdings(saes)
        needed, sizes = needed_bytes(held), self.facts.sizes
        if needed <= available:
            return
        given = f"{self._given(saes)} needs about {gigabytes(needed)} a rank, and there are {gigabytes(available)}"
        way_out = ""
        if len(saes) > 1:
            fit = self.how_many_fit(saes, available=available)
            way_out = f"The first {fit} of them would fit. " if fit else "Not even the first of them would fit. "
        batch_bytes = (2 if self.copies_checkpoints else 1) * self.facts.pool_batch_bytes // self.n_ranks
        pool = sizes and largest_pool(sizes, batch_bytes=batch_bytes, too_much=needed - available)
        if sizes and pool:
            pools = gigabytes(self.facts.pool_bytes // self.n_ranks)
            with_pools = f"harvest.pool_batches={sizes.pool_batches}: with pools of {pools} this"
            given = f"{with_pools} needs about {gigabytes(needed)} a rank, and there are {gigabytes(available)}"
            way_out += f"Largest that fits: {pool}. "
        raise ConfigError(f"{given} {where}. {way_out}{largest(held)}")

    def how_many_fit(self, saes: Sequence[SaePlan], *, available: int) -> int:
        """Return the number of SAEs, from the first on, that would fit together."""
        low, high = 0, len(saes)
        while low < high:
            middle = (low + high + 1) // 2
            fits = needed_bytes(self.holdings(saes[:middle])) <= available
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _given(self, saes: Sequence[SaePlan]) -> str:
        if len(saes) > 1:
            return f"{len(saes)} SAEs of {sum(sae.parameters for sae in saes):,} parameters: this list"
        return f"n_features={saes[0].n_features}, batch_tokens={self.source.batch_tokens}:"

    def _of_rank(self, saes: Sequence[SaePlan], *, columns: int, step_ranks: int) -> tuple[Holding, ...]:
        """Return the tensors of a rank that trains some SAEs.

        SAEs compute one after another: the largest gradients and pre-activations count, and the sum of all else. A
        step's matrices, and the logits of a loss whose gradient is harvested, count both where a batch is harvested
        during a step. Else they follow each other, and the larger counts.

        Args:
            columns: ranks that share the features of each SAE.
            step_ranks: ranks that share the pre-activations of each SAE.
        """
        source, facts, element = self.source, self.facts, self.source.element_size
        parameters = sum(sae.parameters for sae in saes)
        most = max(sae.parameters for sae in saes)
        step, matrices = self._matrices(saes, step_ranks=step_ranks)
        logits = facts.logit_bytes
        if not facts.prefetch:
            step, logits = (step, 0) if step >= logits else (0, logits)
        copied = 3 * element * parameters // step_ranks + facts.pool_bytes // self.n_ranks
        widths = {sae.site: sae.d_model for sae in saes}
        gathered = element * source.batch_tokens * sum(widths.values()) * self.columns // self.n_ranks
        narrower = ("lower n_features" if any(sae.config.n_features for sae in saes) else "lower expansion",)
        fewer = (*narrower, "parallel=features over several ranks") if len(saes) == 1 else (
            "fewer SAEs", *narrower, "parallel=saes or features over several ranks")  # fmt: skip
        shape = _shapes(saes)
        return (
            Holding("language model", facts.model_bytes, ("model.dtype=bfloat16", "a smaller model")),
            Holding(f"weights, 2 of {shape}", element * parameters // columns, fewer),
            Holding(f"moments, 4 of {shape}", 2 * element * parameters // columns, fewer),
            Holding("gradients" + ("" if len(saes) == 1 else " of the largest SAE"), element * most // columns,
                    fewer, phase="step"),
            Holding(f"weights rounded to bf16, 2 of {shape}", 2 * parameters // columns * self.rounds, narrower),
            Holding(f"exported copies while evaluating, 2 of {shape}", FP32 * parameters // columns, fewer,
                    phase="evaluation"),
            Holding("copies of weights, moments and pools while a checkpoint is written",
                    copied if self.copies_checkpoints else 0,
                    ("checkpoint.beside=false",)),
            Holding(matrices, step, ("lower batch_tokens", *narrower)),
            Holding("logits of the language model and the way back through them", logits,
                    ("lower harvest.contexts_per_forward",)),
            Holding("batches of a row of ranks", gathered if self.columns > 1 else 0, ("lower batch_tokens",)),
            Holding("pools", facts.pool_bytes // self.n_ranks,
                    ("lower harvest.pool_batches", "lower batch_tokens")),
            Holding("activations harvested ahead", facts.ahead_bytes // self.n_ranks, ("lower harvest.prefetch",)),
        )  # fmt: skip

    def _matrices(self, saes: Sequence[SaePlan], *, step_ranks: int) -> tuple[int, str]:
        """Return the bytes and the name of the pre-activations, and of what is as large, of the largest SAE."""
        n_tokens = self.source.batch_tokens
        held = [(sparsifier_class(sae.config.sparsifier.name).matrices_held, sae.n_features) for sae in saes]
        count, width = max(held, key=lambda pair: pair[0] * pair[1])
        over = f" over {step_ranks} ranks" if step_ranks > 1 else ""
        name = f"pre-activations and what is as large, {count} of [{n_tokens}, {width}]{over}"
        return count * self.source.element_size * n_tokens * width // step_ranks, name


def rounds_weights(precision: str) -> bool:
    """Return whether a run on this machine holds weights rounded to bf16."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return precision == "bf16" or (precision == "auto" and backend.has_bf16(device))


def _shapes(saes: Sequence[SaePlan]) -> str:
    """Return the shape of the decoder's rows, or the number of SAEs where there are several."""
    return f"[{saes[0].n_features}, {saes[0].d_model}]" if len(saes) == 1 else f"{len(saes)} SAEs"
