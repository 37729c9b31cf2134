"""Penalised sparsifiers: nothing is selected; sparsity has a price, and the price is steered so that L0 comes to k."""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import PenalisedConfig, RunConfig
from sae_train.ranks import Ranks
from sae_train.sae.code import Code, DenseCode, SparseCode
from sae_train.sae.dictionary import Dictionary
from sae_train.sae.firing import Firing
from sae_train.sae.moment import Moment
from sae_train.sparsifiers.base import Sparsifier
from sae_train.sparsifiers.price import Price

DENSE_FROM = 16
"""A batch in which more than a 16th of all pairs matter is computed with its zeros: without them it would cost more."""


class Penalised(Sparsifier):
    """A sparsifier with a price; what it decides for a feature needs no other feature, so no other rank."""

    inference = "threshold"

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        assert isinstance(config.sparsifier, PenalisedConfig)
        super().__init__(config, n_features=n_features)
        self._settle = config.sparsifier.settle

    def equip(self, dictionary: Dictionary) -> None:
        self.price = Price(settle=self._settle, device=dictionary.b_enc.device)

    @abstractmethod
    def bounds(self, dictionary: Dictionary) -> Tensor:
        """Return what a pre-activation must exceed to matter to a value or a gradient [F], detached."""

    @abstractmethod
    def values(self, dictionary: Dictionary, code: Code) -> tuple[Tensor, Tensor]:
        """Return the values of a code's slots, and what their price is of, summed over them; both differentiable.

        Args:
            code: with pre-activations and their graph in the place of values.
        """

    def nudge(self, dictionary: Dictionary, amount: Tensor) -> None:
        """Move the logarithms of all thresholds by `amount`, a scalar on the device."""

    def encode(
        self, dictionary: Dictionary, x_ND: Tensor, pre_NF: Tensor, *, moment: Moment, firing: Firing, ranks: Ranks
    ) -> tuple[Code, Tensor | None]:
        price = self.price.now()
        with torch.no_grad():
            self.nudge(dictionary, self.price.nudge)
            matters_NF = pre_NF > self.bounds(dictionary)
        pre = self._attach(dictionary, x_ND, pre_NF, matters_NF)
        value, priced = self.values(dictionary, pre)
        code = replace(pre, value=value)
        l0 = ranks.sum((value.detach() > 0).sum()) / moment.batch_tokens
        self.price.look(l0, k=self.k_at(moment), moment=moment)
        return code, (price / moment.batch_tokens).to(priced.dtype) * priced

    def _attach(self, dictionary: Dictionary, x_ND: Tensor, pre_NF: Tensor, matters_NF: Tensor) -> Code:
        """Return the pre-activations that matter, with their graph; the same function with its zeros or without."""
        if int(matters_NF.sum()) * DENSE_FROM > matters_NF.numel():
            return DenseCode(value=dictionary.attach_dense(x_ND, pre_NF))
        matches = kernels.select_where(pre_NF, matters_NF)
        places = SparseCode(**matches._asdict(), shape=(len(pre_NF),), n_features=pre_NF.shape[1])
        return dictionary.attach(x_ND, places)

    def figures(self) -> dict[str, float]:
        return {"train/coefficient": float(self.price.now())}

    def state(self) -> dict[str, Tensor]:
        return self.price.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.price.load_state(state)
