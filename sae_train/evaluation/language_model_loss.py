"""What replacing activations by their reconstruction costs the language model.

Positions whose activation was filtered (special tokens, outliers) keep it, and are left out of the averages;
so is the last position of a context, which predicts nothing.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.harvest.held_out import HeldOutBatch
from sae_train.ranks.interface import Ranks

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel

PASSES_OF_A_BATCH = 3
"""Whole forward passes over each evaluated context: clean, spliced, zero-ablated."""


class Baseline:
    """What the language model predicts for a batch of contexts without any SAE.

    The evaluation makes one for each batch; every SAE and every metric of the batch reads it. The clean forward pass
    is the one that gave the batch's activations; the zero-ablated one is made when it is first read.
    """

    def __init__(self, model: "LanguageModel", batch: HeldOutBatch) -> None:
        assert batch.ids_BT is not None, "contexts"
        assert batch.kept_BT is not None, "contexts come with their filter"
        assert batch.logits_BTV is not None, "batches were asked for with logits"
        self._model, self._n_tokens, self._width = model, *batch.raw_ND.shape
        self.ids_BT, self.kept_BT = batch.ids_BT, batch.kept_BT
        self.clean_BTV = _log_probabilities(batch.logits_BTV)
        """[B, T - 1, V] fp32 log-probabilities of the next token."""

    def spliced_BTV(self, x_hat_ND: Tensor) -> Tensor:
        """Return log-probabilities [B, T - 1, V] with `x_hat_ND` at the kept positions: one forward pass."""
        return _log_probabilities(self._model.logits(self.ids_BT, replace=_put(x_hat_ND, self.kept_BT)))

    @cached_property
    def ablated_loss_BT(self) -> Tensor:
        """[B, T - 1] cross-entropy with zeros at the kept positions: one forward pass."""
        zeros_ND = torch.zeros(self._n_tokens, self._width, device=self.kept_BT.device)
        return self.loss(self.spliced_BTV(zeros_ND))

    def loss(self, log_probabilities_BTV: Tensor) -> Tensor:
        """Return minus the log-probability of each next token, [B, T - 1]."""
        return -log_probabilities_BTV.gather(-1, self.ids_BT[:, 1:, None]).squeeze(-1)


class LanguageModelTotals:
    """Sums of cross-entropy (nats) clean, spliced and zero-ablated, and of KL(clean || spliced), of one SAE."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)  # n, clean, spliced, ablated, kl

    @torch.no_grad()
    def add(self, baseline: Baseline, x_hat_ND: Tensor) -> None:
        """Add a batch of contexts.

        Args:
            baseline: of the batch.
            x_hat_ND: the SAE's reconstructions of the batch's kept positions, in order.
        """
        scored_BT = baseline.kept_BT[:, :-1]
        clean, with_sae = baseline.clean_BTV, baseline.spliced_BTV(x_hat_ND)
        kl_BT = (clean.exp() * (clean - with_sae)).sum(-1)
        losses = [baseline.loss(clean), baseline.loss(with_sae)]
        del clean, with_sae
        losses.append(baseline.ablated_loss_BT)
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


def _log_probabilities(logits_BTV: Tensor) -> Tensor:
    """Return fp32 log-probabilities [B, T - 1, V] of the next token."""
    return logits_BTV[:, :-1].float().log_softmax(-1)
