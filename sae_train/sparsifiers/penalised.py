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
    """A sparsifier with a price; what it decides for a feature needs no other feature, so no other rank.

    Attributes:
        has_thresholds: whether features learn thresholds of their own.
        first_price: at the start; activations have a mean squared norm of 1.
    """

    first_price: float

    inference = "threshold"
    has_thresholds = False

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        assert isinstance(config.sparsifier, PenalisedConfig)
        super().__init__(config, n_features=n_features)
        self._settle = config.sparsifier.settle

    def equip(self, dictionary: Dictionary, *, dead_window: int) -> None:
        self.dead_window = dead_window
        self.price = Price(self.first_price, settle=self._settle, device=dictionary.b_enc.device)

    def bounds(self, dictionary: Dictionary) -> Tensor:
        """Return what a pre-activation must exceed to matter to a value or a gradient, detached: [F] or a scalar."""
        return dictionary.b_enc.new_zeros(())

    @abstractmethod
    def values(self, dictionary: Dictionary, code: Code, *, moment: Moment, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Return the values of a code's slots, and what their price is of, summed over them; both differentiable.

        Args:
            code: with pre-activations and their graph in the place of values.
        """

    @abstractmethod
    def nudge(self, dictionary: Dictionary, amount: Tensor) -> None:
        """Make all features fire less often by one common step, a scalar on the device (more often if negative).

        Where thresholds are learned it is of their logarithms, else of the biases, in units of the mean value.
        """

    @torch.no_grad()
    def prepare(self, dictionary: Dictionary) -> None:
        self.nudge(dictionary, self.price.nudge if self.has_thresholds else self.price.nudge * self.price.size)

    def extra_loss(
        self, dictionary: Dictionary, x_ND: Tensor, pre: Code, *, n_tokens: int, firing: Firing, ranks: Ranks
    ) -> Tensor | None:
        """Return this rank's share of a loss that belongs to the method, if any; `pre` as in `values`."""
        return None

    def encode(
        self, dictionary: Dictionary, x_ND: Tensor, pre_NF: Tensor, *, moment: Moment, firing: Firing, ranks: Ranks
    ) -> tuple[Code, Tensor | None]:
        price = self.price.now()
        pre = self._attach(dictionary, x_ND, pre_NF, pre_NF > self.bounds(dictionary))
        value, priced = self.values(dictionary, pre, moment=moment, ranks=ranks)
        with torch.no_grad():
            counts = torch.stack([(value > 0).sum(), value.sum(dtype=torch.float64)])
            fires, total = ranks.sum(counts)
            self.price.look(fires / moment.batch_tokens, size=total / fires, k=self.k_at(moment), moment=moment)
        penalty = (price / moment.batch_tokens).to(priced.dtype) * priced
        extra = self.extra_loss(dictionary, x_ND, pre, n_tokens=moment.batch_tokens, firing=firing, ranks=ranks)
        return replace(pre, value=value), penalty if extra is None else penalty + extra

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
