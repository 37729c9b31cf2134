"""Penalised sparsifiers: nothing is selected. Sparsity has a price, which is steered so that L0 comes to k."""

from abc import abstractmethod
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import PenalisedConfig, SaeConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, DenseCode, SparseCode
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.state import State
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.base import Encoding, Export, Sparsifier
from sae_train.sparsifiers.price import Price

REVIVAL = 1e-3
"""Weight of the loss that revives dead features. With the update's 3e-6 twice as many stayed dead."""
DENSE_FROM = 16
"""A batch in which more than a 16th of all pairs matter is computed with its zeros, which then costs less."""


class Valued(NamedTuple):
    """The values of a code and their losses. All are differentiable."""

    value: Tensor
    """Value of each slot, in the code's shape."""
    priced: Tensor
    """The quantity that the price multiplies, summed over the slots, a scalar."""
    extra_loss: Tensor | None = None
    """This rank's share of a loss that belongs to the method, a scalar."""
    exported: Tensor | None = None
    """Value of each slot in the exported autoencoder, where it differs from `value`. L0 is steered on it."""


class Penalised(Sparsifier):
    """A sparsifier with a price. It decides about a feature without any other feature, so without other ranks.

    Attributes:
        has_thresholds: whether features learn thresholds of their own.
        first_price: price at the start. Activations have a mean squared norm of 1.
        price: the steered price.
    """

    first_price: float

    has_thresholds = False

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        assert isinstance(config.sparsifier, PenalisedConfig)
        self._settle, fixed = config.sparsifier.settle, config.sparsifier.coefficient
        self._dead_window = sizes.dead_window
        self.price = Price(self.first_price, settle=self._settle, device=ranks.device, fixed=fixed)

    def bounds(self, sae: TrainableAutoencoder) -> Tensor:
        """Return the bound above which a pre-activation has a value or a gradient, detached: [F] or a scalar.

        Only jumprelu overrides it: pseudo-gradients reach below its thresholds.
        """
        return sae.b_enc.new_zeros(())

    @abstractmethod
    def thresholds(self, sae: TrainableAutoencoder) -> Tensor:
        """Return the thresholds [F] of the exported autoencoder."""

    @abstractmethod
    def values(self, sae: TrainableAutoencoder, pre: Code, inputs: StepInputs) -> Valued:
        """Return the values of a code's slots and their losses.

        Args:
            sae: parameters that the gradients belong to.
            pre: code whose values are pre-activations, with their graph.
            inputs: the step's tensors.
        """

    @abstractmethod
    def nudge(self, sae: TrainableAutoencoder, amount: Tensor) -> None:
        """Make all features fire less often by one common step, a scalar on the device. More often if negative.

        The step is added to the logarithms of learned thresholds. Without those it is taken off the biases, in units
        of the mean value.
        """

    @torch.no_grad()
    def before_step(self, sae: TrainableAutoencoder, *, halted: Tensor) -> None:
        amount = torch.where(halted, 0, self.price.nudge)
        self.nudge(sae, amount if self.has_thresholds else amount * self.price.size)

    def encode(self, sae: TrainableAutoencoder, inputs: StepInputs) -> Encoding:
        n_tokens = inputs.info.batch_tokens
        price = self.price.now(inputs.info)
        pre = self._attach(sae, inputs)
        valued = self.values(sae, pre, inputs)
        self._steer(valued.value if valued.exported is None else valued.exported, inputs)
        penalty = (price / n_tokens).to(valued.priced.dtype) * valued.priced
        penalty = penalty + self._revival(sae, inputs)
        if valued.extra_loss is not None:
            penalty = penalty + valued.extra_loss
        code = replace(pre, value=valued.value)
        return Encoding(code, code, penalty)

    @torch.no_grad()
    def _steer(self, fired: Tensor, inputs: StepInputs) -> None:
        """Move the price by the L0 of a step's values."""
        counts = torch.stack([(fired > 0).sum(), fired.sum(dtype=torch.float64)])
        fires, total = inputs.ranks.sum(counts)
        l0, info = fires / inputs.info.batch_tokens, inputs.info
        self.price.update(l0, size=total / fires, k=self.k_at(info), info=info)

    def _revival(self, sae: TrainableAutoencoder, inputs: StepInputs) -> Tensor:
        """Return the distance of this rank's dead features from firing, summed over tokens and weighted, a scalar.

        A feature that never fires has no gradient of the reconstruction. From Anthropic's January 2025 update, whose
        loss draws a dead JumpReLU feature's pre-activations and its threshold together. Ours: the loss for gates and
        biases, and the weight.
        """
        x_ND, n_tokens = inputs.x_ND, inputs.info.batch_tokens
        bound_F = self.thresholds(sae) if self.has_thresholds else torch.zeros_like(sae.b_enc)
        lacks_F = (bound_F - sae.b_enc) * (len(x_ND) / n_tokens) - sae.W_enc @ (x_ND.sum(0) / n_tokens)
        return REVIVAL * torch.where(inputs.firing.dead_F(self._dead_window), lacks_F, 0).sum()

    def _attach(self, sae: TrainableAutoencoder, inputs: StepInputs) -> Code:
        """Return the pre-activations that matter, with their graph: with zeros or without, the same function."""
        x_ND, pre_NF = inputs.x_ND, inputs.pre_NF
        assert isinstance(pre_NF, Tensor), "it reads all pre-activations"
        n_tokens, n_features = pre_NF.shape
        most = n_tokens * n_features / DENSE_FROM
        matters_NF = pre_NF > self.bounds(sae)
        if int(matters_NF.count_nonzero()) > most:
            return DenseCode(value=sae.attach_dense(x_ND, pre_NF))
        matches = kernels.select_where(pre_NF, matters_NF)
        places = SparseCode(**matches._asdict(), shape=(n_tokens,), n_features=n_features)
        return sae.attach(x_ND, places)

    def collapse_advice(self, info: StepInfo) -> str | None:
        return None if info.tokens <= self._settle * info.total_tokens else ""

    def export(self, sae: TrainableAutoencoder, info: StepInfo) -> Export:
        return replace(super().export(sae, info), threshold_F=self.thresholds(sae).detach())

    def figures(self, info: StepInfo) -> dict[str, float]:
        return {"train/coefficient": float(self.price.now(info))}

    def state(self) -> State:
        return State(self.price.state(), {})

    def load_state(self, state: State) -> None:
        self.price.load_state(state.shared)
