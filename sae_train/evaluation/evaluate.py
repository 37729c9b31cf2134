"""Every figure of an exported SAE on the evaluation half of the held-out data."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_train.evaluation.density import density_figures
from sae_train.evaluation.language_model_loss import LanguageModelTotals
from sae_train.evaluation.reconstruction import ReconstructionTotals
from sae_train.evaluation.rounds import rounds
from sae_train.harvest.held_out import HeldOut, HeldOutBatch
from sae_train.ranks import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.sharded import reconstruct

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
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the figures of `eval/` (docs/metrics.md) and of summary.json; what does not apply is absent. Collective.

    Args:
        sae: this rank's features.
        max_tokens: held-out tokens to use, over all ranks.
        language_model: where the reconstruction is spliced back; None, or one without a loss, leaves CE and KL out.
        n_features: of the whole dictionary.
        ranks: the grid.
        between: called before each batch, by all ranks together; what it raises ends this.
    """
    totals = ReconstructionTotals(shift_D=sae.b_dec, n_features=n_features, ranks=ranks)
    spliced = LanguageModelTotals(ranks.device) if language_model is not None and language_model.has_loss else None
    nothing = HeldOutBatch(
        raw_ND=torch.zeros(0, sae.d_model, device=ranks.device),
        context_N=torch.zeros(0, dtype=torch.int64, device=ranks.device),
        ids_BT=None,
        kept_BT=None,
    )
    for turn in rounds(held_out.batches("evaluation", max_tokens=max_tokens), ranks):
        between()
        batch = turn.batch or nothing
        made = reconstruct(sae, batch.raw_ND, n_features=n_features, ranks=ranks)
        totals.add(batch.raw_ND, batch.context_N, made)
        if batch.ids_BT is not None and spliced is not None and language_model is not None:
            assert batch.kept_BT is not None, "contexts come with their filter"
            spliced.add(language_model, batch.ids_BT, batch.kept_BT, made.x_hat_ND)
    figures: dict[str, Any] = dict(totals.figures())
    figures["density"] = density_figures(totals.density())
    if spliced is not None:
        figures |= spliced.figures(ranks)
    cosine_F = decoder_cosine_max(sae.W_dec, n_features=n_features, ranks=ranks)
    figures["decoder_cosine_max"] = float(ranks.features.sum(cosine_F.double().sum())) / n_features
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
