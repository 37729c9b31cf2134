"""Every figure of an exported SAE on the evaluation half of the held-out data."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_train.evaluation.density import density_figures
from sae_train.evaluation.language_model_loss import Baseline, LanguageModelTotals
from sae_train.evaluation.reconstruction import ReconstructionTotals
from sae_train.evaluation.rounds import rounds
from sae_train.evaluation.spread import reconstruct
from sae_train.harvest.held_out import HeldOut, HeldOutBatch
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel

COMPARED_ROWS = 1024  # rows of W_dec compared at a time in decoder_cosine_max


def evaluate(
    sae: SparseAutoencoder,
    held_out: HeldOut,
    *,
    max_tokens: int,
    language_model: "LanguageModel | None",
    n_features: int,
    ranks: Ranks,
    phases: Phases = SILENT,
) -> dict[str, Any]:
    """Return the figures of one SAE; see `evaluate_all`."""
    (figures,) = evaluate_all(
        [sae],
        held_out,
        max_tokens=max_tokens,
        language_model=language_model,
        n_features=n_features,
        ranks=ranks,
        phases=phases,
    )
    return figures


def evaluate_all(
    saes: Sequence[SparseAutoencoder],
    held_out: HeldOut,
    *,
    max_tokens: int,
    language_model: "LanguageModel | None",
    n_features: int,
    ranks: Ranks,
    phases: Phases = SILENT,
) -> list[dict[str, Any]]:
    """Return for each SAE of one site the figures of `eval/` (docs/metrics.md) and of summary.json. Collective.

    What does not apply is absent. All SAEs share the clean and the zero-ablated forward pass of a batch.

    Args:
        saes: this rank's features of each.
        max_tokens: held-out tokens to use, over all ranks.
        language_model: where reconstructions are spliced back; None, or one without a loss, leaves CE and KL out.
        n_features: of the whole dictionary.
        ranks: the grid.
        phases: told after each batch, by all ranks together; what it raises ends this.
    """
    model = language_model if language_model is not None and language_model.has_loss else None
    totals = [_Totals(sae, has_loss=model is not None, n_features=n_features, ranks=ranks) for sae in saes]
    nothing = HeldOutBatch(
        raw_ND=torch.zeros(0, saes[0].d_model, device=ranks.device),
        context_N=torch.zeros(0, dtype=torch.int64, device=ranks.device),
        ids_BT=None,
        kept_BT=None,
    )
    batches = held_out.batches("evaluation", max_tokens=max_tokens, with_logits=model is not None)
    for turn in rounds(batches, ranks):
        batch = turn.batch or nothing
        baseline = None if model is None or batch.ids_BT is None else Baseline(model, batch)
        for each in totals:
            each.add(batch, baseline)
        phases.meet(turn.n_tokens)
    return [each.figures() for each in totals]


class _Totals:
    """The sums of one SAE over the batches of an evaluation."""

    def __init__(self, sae: SparseAutoencoder, *, has_loss: bool, n_features: int, ranks: Ranks) -> None:
        self._sae, self._n_features, self._ranks = sae, n_features, ranks
        self._reconstruction = ReconstructionTotals(shift_D=sae.b_dec, n_features=n_features, ranks=ranks)
        self._spliced = LanguageModelTotals(ranks.device) if has_loss else None

    def add(self, batch: HeldOutBatch, baseline: Baseline | None) -> None:
        made = reconstruct(self._sae, batch.raw_ND, n_features=self._n_features, ranks=self._ranks)
        self._reconstruction.add(batch.raw_ND, batch.context_N, made)
        if self._spliced is not None and baseline is not None:
            self._spliced.add(baseline, made.x_hat_ND)

    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = dict(self._reconstruction.figures())
        figures["density"] = density_figures(self._reconstruction.density())
        if self._spliced is not None:
            figures |= self._spliced.figures(self._ranks)
        cosine_F = decoder_cosine_max(self._sae.W_dec, n_features=self._n_features, ranks=self._ranks)
        figures["decoder_cosine_max"] = float(self._ranks.features.sum(cosine_F.double().sum())) / self._n_features
        return figures


@torch.no_grad()
def decoder_cosine_max(W_dec_FD: Tensor, *, n_features: int, ranks: Ranks) -> Tensor:
    """Return [F]: the largest cosine of this rank's features to another feature's decoder row (rows of unit norm).

    The row's shards go round one by one, so that two are held at most. Collective.
    """
    row = ranks.features
    largest_F = W_dec_FD.new_full((len(W_dec_FD),), -1.0)
    for column, (low, high) in enumerate(row.slices(n_features)):
        own = column == row.rank
        other_FD = row.broadcast(
            W_dec_FD.detach() if own else W_dec_FD.new_empty(high - low, W_dec_FD.shape[1]), column
        )
        for first in range(0, len(W_dec_FD), COMPARED_ROWS):
            cosine = W_dec_FD[first : first + COMPARED_ROWS] @ other_FD.T
            if own:
                cosine.diagonal(first).fill_(-1.0)
            compared_F = largest_F[first : first + COMPARED_ROWS]
            torch.maximum(compared_F, cosine.max(1).values, out=compared_F)
    return largest_F
