"""Gradient (g-SAE): as TopK, but what the language model's loss heeds counts for more in the choice.

Olmo et al. 2024 (arXiv 2411.10397), from a summary of the paper, whose text and code were not seen: TopK's choice is
augmented by beta * z_j * |d_j . g|, z_j the affinity, d_j the decoder row and g the gradient of the language model's
loss with respect to the activation, so that |d_j . g| is how fast the loss changes with the feature's value. Inferred:
that the term is added to z_j (a large beta leaves it alone to decide), that values stay z_j, beta = 1, and that
inference, where there are no gradients, is plain TopK. Ours: |d_j . g| over its mean over the whole batch, tokens and
features alike, so that neither beta nor k depends on the unit of the gradient. Multi-TopK's wider choice, where it is
asked for, is plain TopK's.
"""

import math

from torch import Tensor, addcmul, float64, where

from sae_train import kernels
from sae_train.config import GradientConfig, RunConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.step_info import StepInfo
from sae_train.sparsifiers.topk import TopK


class Gradient(TopK):
    """Keeps round(k) matches a token, those of the largest scores; without slopes it is TopK."""

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        super().__init__(config, n_features=n_features)
        assert isinstance(config.sparsifier, GradientConfig)
        self._beta = config.sparsifier.beta
        if config.reads_gradients:
            self.kept_a_token = math.inf  # scores are of all pairs
        self._slope_NF: Tensor | None = None

    def heed(self, slope_NF: Tensor) -> None:
        self._slope_NF = slope_NF

    def select(self, pre_NF: kernels.PreActivations, *, info: StepInfo, firing: Firing, ranks: Ranks) -> SparseCode:
        slope_NF, self._slope_NF = self._slope_NF, None
        if slope_NF is None:
            return super().select(pre_NF, info=info, firing=firing, ranks=ranks)
        assert isinstance(pre_NF, Tensor), "all pre-activations are read"
        score_NF = self._scores(pre_NF, slope_NF, n_tokens=info.batch_tokens, ranks=ranks)
        k = round(self.k_at(info))
        chosen = kernels.select_rows(score_NF, k=k, capacity=self.capacity, n_features=self.n_features, ranks=ranks)
        value = where(chosen.value > 0, pre_NF[chosen.token.long(), chosen.feature.long()], 0)
        return self.code(chosen._replace(value=value), pre_NF)

    def _scores(self, pre_NF: Tensor, slope_NF: Tensor, *, n_tokens: int, ranks: Ranks) -> Tensor:
        """Return z + beta z |slope| / mean |slope|, in the place of the slopes: positive where z is, z itself at 0.

        The mean is over all ranks: each holds tokens or features of its own.
        """
        size_NF = slope_NF.abs_()
        # a row's in fp32: of all pairs float64 would take a sixth of the step
        mean = ranks.sum(size_NF.sum(1).sum(dtype=float64)) / (n_tokens * self.n_features)
        factor = where(mean > 0, self._beta / where(mean > 0, mean, 1), 0)
        return addcmul(pre_NF, pre_NF, size_NF.mul_(factor), out=size_NF)
