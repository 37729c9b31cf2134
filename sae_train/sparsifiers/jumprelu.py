"""JumpReLU: a feature fires where its pre-activation is above a threshold that it learns.

From Rajamanoharan et al. 2024 (arXiv 2407.14435): thresholds as exponentials of parameters, straight-through gradients
on pre-activations, a price on L0. From Anthropic's January 2025 update, as libraries have it: the penalty tanh, a
smooth stand-in for L0 with gradients to the encoder. Ours: the first threshold and the bandwidth (for millions of
tokens rather than billions), and the steering of the price.
"""

import math

import torch
from torch import Tensor, nn

from sae_train import kernels
from sae_train.config import JumpReLUConfig, RunConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.penalised import Penalised
from sae_train.sparsifiers.straight_through import jump_relu, reach, step

FARTHEST = 20.0
"""Where the logarithms of thresholds are held if L0 cannot be reached: beyond it exponentials would end as 0."""
STEEPNESS = 4.0
"""c of the penalty tanh for activations of mean norm sqrt(d_model), as in the update; ours have mean square 1."""


class JumpReLU(Penalised):
    """The price is of a match (`l0`), or of tanh(c value) (`tanh`)."""

    has_thresholds = True
    first_price = 3e-4
    cure = " or sparsifier.threshold"

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        assert isinstance(config.sparsifier, JumpReLUConfig)
        self._settings = config.sparsifier
        super().__init__(config, n_features=n_features)

    def equip(self, dictionary: TrainableAutoencoder, *, dead_window: int) -> None:
        super().equip(dictionary, dead_window=dead_window)
        start_F = torch.full_like(dictionary.b_enc, math.log(self._settings.threshold))
        dictionary.log_threshold = nn.Parameter(start_F)
        given = self._settings.steepness
        self._steepness = STEEPNESS * math.sqrt(dictionary.d_model) if given is None else given

    def rates(self) -> dict[str, float]:
        return {"log_threshold": self._settings.threshold_rate}

    def thresholds(self, dictionary: TrainableAutoencoder) -> Tensor:
        threshold_F: Tensor = dictionary.log_threshold.exp()
        return threshold_F

    def bounds(self, dictionary: TrainableAutoencoder) -> Tensor:
        return self.thresholds(dictionary).detach() - reach(self._settings.bandwidth)

    def nudge(self, dictionary: TrainableAutoencoder, amount: Tensor) -> None:
        dictionary.log_threshold.add_(amount.to(dictionary.log_threshold.dtype)).clamp_(-FARTHEST, FARTHEST)

    def values(
        self, dictionary: TrainableAutoencoder, code: Code, *, info: StepInfo, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        threshold, bandwidth = self.thresholds(dictionary), self._settings.bandwidth
        if isinstance(code, SparseCode):
            threshold = kernels.of_features(threshold, code.feature, code.token, code.start)
        else:
            threshold = threshold.expand_as(code.value)
        value = jump_relu(code.value, threshold, bandwidth=bandwidth)
        if self._settings.penalty == "tanh":
            return value, torch.tanh(self._steepness * value).sum()
        return value, step(code.value, threshold, bandwidth=bandwidth).sum()
