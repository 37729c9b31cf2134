"""What replacing activations by their reconstruction costs the language model.

Positions whose activation was filtered (special tokens, outliers) keep it, and are left out of the averages;
so is the last position of a context, which predicts nothing.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.ranks import Ranks

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel


class LanguageModelTotals:
    """Sums of cross-entropy (nats) clean, spliced and zero-ablated, and of KL(clean || spliced)."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)  # n, clean, spliced, ablated, kl

    @torch.no_grad()
    def add(self, model: "LanguageModel", ids_BT: Tensor, kept_BT: Tensor, x_hat_ND: Tensor) -> None:
        """Add a batch of contexts.

        Args:
            ids_BT: token ids.
            kept_BT: which positions the SAE is responsible for.
            x_hat_ND: its reconstructions of those, in order.
        """
        scored_BT = kept_BT[:, :-1]
        clean = _log_probabilities(model, ids_BT, None)
        with_sae = _log_probabilities(model, ids_BT, _put(x_hat_ND, kept_BT))
        kl_BT = (clean.exp() * (clean - with_sae)).sum(-1)
        losses = [_cross_entropy(clean, ids_BT), _cross_entropy(with_sae, ids_BT)]
        del clean, with_sae
        ablated = _log_probabilities(model, ids_BT, _put(torch.zeros_like(x_hat_ND), kept_BT))
        losses.append(_cross_entropy(ablated, ids_BT))
        parts = [torch.ones_like(kl_BT), *losses, kl_BT]
        self.sums += torch.stack([part[scored_BT].double().sum() for part in parts])

    def figures(self, ranks: Ranks) -> dict[str, float]:
        """Return the figures over all ranks' scored positions.

        ce = CE clean; delta_ce = CE spliced - CE clean; kl = mean KL(clean || spliced); all in nats.
        ce_recovered = (CE zeroed - CE spliced) / (CE zeroed - CE clean).
        """
        n, clean, spliced, ablated, kl = ranks.sum(self.sums).tolist()
        if n == 0:
            return {}
        figures = {"ce": clean / n, "delta_ce": (spliced - clean) / n, "kl": kl / n}
        if ablated != clean:
            figures["ce_recovered"] = (ablated - spliced) / (ablated - clean)
        return figures


def _put(x_hat_ND: Tensor, kept_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what replaces the activations at the kept positions by `x_hat_ND`, and leaves the others alone."""
    return lambda acts_BTD: acts_BTD.masked_scatter(kept_BT.unsqueeze(-1), x_hat_ND.to(acts_BTD.dtype))


def _log_probabilities(model: "LanguageModel", ids_BT: Tensor, replace: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return fp32 log-probabilities [B, T-1, V] of the next token."""
    return model.logits(ids_BT, replace=replace)[:, :-1].float().log_softmax(-1)


def _cross_entropy(log_probabilities: Tensor, ids_BT: Tensor) -> Tensor:
    """Return minus the log-probability of each next token, [B, T-1]."""
    return -log_probabilities.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
