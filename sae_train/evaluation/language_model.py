"""Predictions of the language model for held-out contexts, with activations replaced or not.

Letters: B contexts, T positions, V vocabulary, N kept tokens, D d_model.
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.harvest.held_out import HeldOutBatch, HeldOutRows

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel


class Baseline:
    """Predictions of the language model for a batch of contexts without an SAE, for the SAEs of one site.

    `baselines` creates one for each site of a batch; the site's language model metrics read it. The clean forward pass
    is the one that produced the batch's activations. The zero-ablated one runs when it is first read.
    """

    def __init__(
        self, model: "LanguageModel", site: str, rows: HeldOutRows, *, ids_BT: Tensor, clean_BTV: Tensor
    ) -> None:
        assert rows.kept_BT is not None, "contexts come with their filter"
        self._model, self._site, self._n_tokens, self._width = model, site, *rows.raw_ND.shape
        self.ids_BT, self.kept_BT = ids_BT, rows.kept_BT
        self.clean_BTV = clean_BTV
        """[B, T - 1, V] fp32 log-probabilities of the next token. The sites of a batch share the tensor."""

    def spliced_BTV(self, x_hat_ND: Tensor) -> Tensor:
        """Return log-probabilities [B, T - 1, V] with `x_hat_ND` at the site's kept positions: one forward pass."""
        replace = {self._site: _put(x_hat_ND, self.kept_BT)}
        return _log_probabilities(self._model.logits(self.ids_BT, replace=replace))

    @cached_property
    def ablated_loss_BT(self) -> Tensor:
        """[B, T - 1] cross-entropy with zeros at the kept positions: one forward pass."""
        zeros_ND = torch.zeros(self._n_tokens, self._width, device=self.kept_BT.device)
        return self.loss(self.spliced_BTV(zeros_ND))

    def loss(self, log_probabilities_BTV: Tensor) -> Tensor:
        """Return minus the log-probability of each next token, [B, T - 1]."""
        return -log_probabilities_BTV.gather(-1, self.ids_BT[:, 1:, None]).squeeze(-1)


def baselines(model: "LanguageModel", batch: HeldOutBatch) -> dict[str, Baseline]:
    """Return the predictions for each site of a batch. The batch comes with logits."""
    assert batch.ids_BT is not None, "contexts"
    assert batch.logits_BTV is not None, "batches come with logits"
    ids_BT, clean_BTV = batch.ids_BT, _log_probabilities(batch.logits_BTV)
    return {site: Baseline(model, site, rows, ids_BT=ids_BT, clean_BTV=clean_BTV) for site, rows in batch.sites.items()}


def _put(x_hat_ND: Tensor, kept_BT: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that replaces the activations at the kept positions by `x_hat_ND`."""
    return lambda acts_BTD: acts_BTD.masked_scatter(kept_BT.unsqueeze(-1), x_hat_ND.to(acts_BTD.dtype))


def _log_probabilities(logits_BTV: Tensor) -> Tensor:
    """Return fp32 log-probabilities [B, T - 1, V] of the next token."""
    return logits_BTV[:, :-1].float().log_softmax(-1)
