"""Predictions of the language model for held-out contexts, with activations replaced or not.

Letters: B contexts, T positions, V vocabulary, N kept tokens, D d_model.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.harvest.held_out import HeldOutBatch

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel

PASSES_OF_A_BATCH = 3
"""Whole forward passes over each evaluated context: clean, spliced and zero-ablated."""


class Baseline:
    """Predictions of the language model for a batch of contexts without an SAE.

    `evaluate` creates one for each batch; every SAE's language model metrics read it. The clean forward pass is the one
    that produced the batch's activations. The zero-ablated one runs when it is first read.
    """

    def __init__(self, model: "LanguageModel", batch: HeldOutBatch) -> None:
        assert batch.ids_BT is not None, "contexts"
        assert batch.kept_BT is not None, "contexts come with their filter"
        assert batch.logits_BTV is not None, "batches come with logits"
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


def _put(x_hat_ND: Tensor, kept_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that replaces the activations at the kept positions by `x_hat_ND`."""
    return lambda acts_BTD: acts_BTD.masked_scatter(kept_BT.unsqueeze(-1), x_hat_ND.to(acts_BTD.dtype))


def _log_probabilities(logits_BTV: Tensor) -> Tensor:
    """Return fp32 log-probabilities [B, T - 1, V] of the next token."""
    return logits_BTV[:, :-1].float().log_softmax(-1)
