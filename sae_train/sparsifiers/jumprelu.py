"""JumpReLU: a feature fires where its pre-activation is above a threshold that it learns.

From Rajamanoharan et al. 2024 (arXiv 2407.14435): thresholds as exponentials of parameters, straight-through gradients
on pre-activations, a price on L0. From Anthropic's January 2025 update, as libraries have it: the penalty tanh, a
smooth stand-in for L0 with gradients to the encoder. Ours: the first threshold and the bandwidth (for millions of
tokens rather than billions), and the steering of the price.
"""

import math

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import JumpReLUConfig, SaeConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import ExtraParameter, TrainableAutoencoder
from sae_train.sparsifiers.penalised import Penalised, Valued
from sae_train.sparsifiers.straight_through import jump_relu, reach, step

FARTHEST = 20.0
"""Largest absolute logarithm of a threshold. Where L0 cannot be reached, exponentials would end as 0 beyond it."""
STEEPNESS = 4.0
"""c of the penalty tanh for activations of mean norm sqrt(d_model), as in the update. Ours have mean square 1."""


class JumpReLU(Penalised):
    """The price is of a match (`l0`), or of tanh(c value) (`tanh`).

    Parameter: `log_threshold` [F].
    """

    matrices_held = 10
    has_thresholds = True
    first_price = 3e-4

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        assert isinstance(config.sparsifier, JumpReLUConfig)
        self._settings, given = config.sparsifier, config.sparsifier.steepness
        self._steepness = STEEPNESS * math.sqrt(sizes.d_model) if given is None else given

    def extra_parameters(self) -> dict[str, ExtraParameter]:
        settings = self._settings
        return {"log_threshold": ExtraParameter(math.log(settings.threshold), rate=settings.threshold_rate)}

    def thresholds(self, sae: TrainableAutoencoder) -> Tensor:
        threshold_F: Tensor = sae.get_parameter("log_threshold").exp()
        return threshold_F

    def bounds(self, sae: TrainableAutoencoder) -> Tensor:
        return self.thresholds(sae).detach() - reach(self._settings.bandwidth)

    def nudge(self, sae: TrainableAutoencoder, amount: Tensor) -> None:
        log_threshold = sae.get_parameter("log_threshold")
        log_threshold.add_(amount.to(log_threshold.dtype)).clamp_(-FARTHEST, FARTHEST)

    def values(self, sae: TrainableAutoencoder, pre: Code, inputs: StepInputs) -> Valued:
        threshold, bandwidth = self.thresholds(sae), self._settings.bandwidth
        if isinstance(pre, SparseCode):
            threshold = kernels.of_features(threshold, pre.feature, pre.token, pre.start)
        else:
            threshold = threshold.expand_as(pre.value)
        value = jump_relu(pre.value, threshold, bandwidth=bandwidth)
        if self._settings.penalty == "tanh":
            return Valued(value, torch.tanh(self._steepness * value).sum())
        return Valued(value, step(pre.value, threshold, bandwidth=bandwidth).sum())

    def collapse_advice(self, info: StepInfo) -> str | None:
        advice = super().collapse_advice(info)
        return None if advice is None else f"{advice} or sparsifier.threshold"
