"""Every figure of an exported SAE on the evaluation half of the held-out data."""

from typing import Any

import torch
from torch import Tensor

from sae_train.evaluation.density import density_figures
from sae_train.evaluation.language_model_loss import LanguageModelTotals
from sae_train.evaluation.reconstruction import ReconstructionTotals
from sae_train.harvest.held_out import HeldOut
from sae_train.harvest.language_model import LanguageModel
from sae_train.ranks import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder

COMPARED_ROWS = 1024  # rows of W_dec compared at a time in decoder_cosine_max


def evaluate(
    sae: SparseAutoencoder,
    held_out: HeldOut,
    *,
    max_tokens: int,
    language_model: LanguageModel | None,
    ranks: Ranks,
) -> dict[str, Any]:
    """Return the figures of design.md 10's `eval/` and of summary.json; what does not apply is absent.

    Args:
        max_tokens: held-out tokens to use, over all ranks.
        language_model: where the reconstruction is spliced back; None, or one without a loss, leaves CE and KL out.
    """
    totals = ReconstructionTotals(d_model=sae.d_model, n_features=sae.n_features, device=ranks.device)
    spliced = LanguageModelTotals(ranks.device) if language_model is not None and language_model.has_loss else None
    for batch in held_out.batches("evaluation", max_tokens=max_tokens):
        totals.add(sae, batch.raw_ND, batch.context_N)
        if spliced is not None and language_model is not None and batch.ids_BT is not None:
            assert batch.kept_BT is not None, "contexts come with their filter"
            spliced.add(sae, language_model, batch.ids_BT, batch.kept_BT)
    figures: dict[str, Any] = dict(totals.figures(ranks))
    figures["density"] = density_figures(totals.density_F(ranks))
    if spliced is not None:
        figures |= spliced.figures(ranks)
    figures["decoder_cosine_max"] = float(decoder_cosine_max(sae.W_dec).mean())
    return figures


@torch.no_grad()
def decoder_cosine_max(W_dec_FD: Tensor) -> Tensor:
    """Return [F]: each feature's largest cosine to another feature's decoder row (rows of unit norm)."""
    n_features = len(W_dec_FD)
    largest_F = W_dec_FD.new_zeros(n_features)
    for first in range(0, n_features, COMPARED_ROWS):
        cosine = W_dec_FD[first : first + COMPARED_ROWS] @ W_dec_FD.T
        own = torch.arange(first, first + len(cosine), device=cosine.device)
        cosine[torch.arange(len(cosine), device=cosine.device), own] = -1.0
        largest_F[first : first + len(cosine)] = cosine.max(1).values
    return largest_F
