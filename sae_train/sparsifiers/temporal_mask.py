"""Adaptive Temporal Masking: features of little importance so far are left out of a step at random.

Li and Ren 2025 (arXiv 2510.08855). We have seen an abstract and a summary with two formulas; there is no public code.
From those:

- Each feature has moving averages of its value, of how often it fires and of its contribution to the reconstruction.
  They combine into an importance I.
- The threshold is theta = mu + c sigma, with the mean and standard deviation of I over features.
- A feature with I below theta is masked with probability 1 - exp(-r (theta - I) / theta).
- The loss is a reconstruction error and an L1 penalty.

Inferred, by us:

- The importance is the geometric mean of the three averages. Dividing each by its mean over features would change
  nothing, because the probability depends on ratios of importances alone.
- The contribution is the growth of half the squared error without the feature: f <d, e> + f^2 / 2 for a unit decoder
  row d and the error e, averaged over tokens, at least 0. Averages are over all tokens, with a half-life.
- One mask is drawn for each step and feature, and holds for all tokens. Its probability is at most 0.9. A masked
  feature has no gradient in that step, of reconstruction or penalty.
- Averages are of the unmasked code, and e is the error of its reconstruction, which costs one more decode. Otherwise a
  feature that is masked often would look unimportant, and would be masked for that.
- Nothing is masked at first. Then r rises from 0 to its value.
- Codes, penalty, steering and export are those of ReLU with unit norms. L0 is steered on the unmasked code, which is
  exported. With `export_mask`, features that would be masked in more than half of the steps at the end get a threshold
  of +inf, and L0 is steered on the others.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import SaeConfig, TemporalMaskConfig
from sae_train.config.sparsifiers import MASKED_FROM
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.random import keyed_generator
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.state import State
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.base import Encoding
from sae_train.sparsifiers.l1 import ReLU
from sae_train.sparsifiers.penalised import Valued

MOST = 0.9
"""Largest probability of being masked, so that every feature learns in a tenth of the steps."""
HALF_LIFE = 140_000
"""Half-life of the averages in tokens: a factor of 0.99 a step of 2048 tokens."""
HALF_LIVES = 8
"""Smallest number of half-lives in a run. A short run has a shorter half-life."""


class TemporalMask(ReLU):
    """A ReLU autoencoder of unit norms. Each step leaves out some of its features.

    Attributes:
        averages_F3: float64, three moving averages of each of this rank's features: value, share of tokens on which it
            fires, and contribution. Their half-life is in tokens, and their bias towards 0 at the start is corrected.
        masked_F: float64, probability that each feature is masked in the next step.
    """

    matrices_held = 8

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        assert isinstance(config.sparsifier, TemporalMaskConfig)
        self._mask = config.sparsifier
        lo, hi = ranks.features.slice(sizes.n_features)
        self.averages_F3 = torch.zeros(hi - lo, 3, dtype=torch.float64, device=ranks.device)
        self.masked_F = torch.zeros_like(self.averages_F3[:, 0])
        self._masked_share = self.masked_F.new_zeros(())
        self._left_F: Tensor | None = None

    def strength_at(self, tokens: int, total_tokens: int) -> float:
        """Return r after so many tokens: 0 during `warmup`, then in proportion up to `strength` over `ramp`."""
        since, ramp = tokens - self._mask.warmup * total_tokens, self._mask.ramp * total_tokens
        if since < 0:
            return 0.0
        return self._mask.strength * (min(1.0, since / ramp) if ramp > 0 else 1.0)

    def encode(self, sae: TrainableAutoencoder, inputs: StepInputs) -> Encoding:
        self._left_F = self._draw(inputs.info, inputs.ranks)
        encoding = super().encode(sae, inputs)
        self._update_averages(sae, encoding.code, inputs)
        if self._left_F is None:
            return encoding
        return encoding._replace(decoded=_of(encoding.code, self._left_F))

    def values(self, sae: TrainableAutoencoder, pre: Code, inputs: StepInputs) -> Valued:
        valued = super().values(sae, pre, inputs)
        code = replace(pre, value=valued.value)
        if self._left_F is not None:
            valued = valued._replace(priced=_of(code, self._left_F).value.sum())
        if self._mask.export_mask:
            valued = valued._replace(exported=_of(code, self.masked_F <= MASKED_FROM).value)
        return valued

    @torch.no_grad()
    def _update_averages(self, sae: TrainableAutoencoder, code: Code, inputs: StepInputs) -> None:
        """Update averages and probabilities from a step's code with all its features, which is decoded for that."""
        info, ranks = inputs.info, inputs.ranks
        code = replace(code, value=code.value.detach())
        error_ND = inputs.x_ND - sae.decode(code, ranks=ranks)
        means_F3 = ranks.data.sum(_sums(sae, code, error_ND)) / info.batch_tokens
        done, half_life = info.tokens + info.batch_tokens, self._mask.half_life
        if half_life is None:
            half_life = min(HALF_LIFE, max(1, info.total_tokens // HALF_LIVES))
        lost, lost_of_all = (1 - 0.5 ** (tokens / half_life) for tokens in (info.batch_tokens, done))
        self.averages_F3 = self.averages_F3.lerp(means_F3, lost / lost_of_all)
        self.masked_F = self._probabilities(self.strength_at(done, info.total_tokens), ranks)
        self._masked_share = ranks.features.sum(self.masked_F.sum()) / self.n_features

    def _probabilities(self, strength: float, ranks: Ranks) -> Tensor:
        """Return the probability [F] that each of this rank's features is masked. The threshold is over all ranks."""
        importance_F = self.averages_F3.clamp(min=0).prod(1).pow(1 / 3)
        total, squares = ranks.features.sum(torch.stack([importance_F.sum(), importance_F.square().sum()]))
        mean = total / self.n_features
        deviation = (squares / self.n_features - mean.square()).clamp(min=0).sqrt()
        threshold = mean + self._mask.deviations * deviation
        below_F = (threshold - importance_F).clamp(min=0) / torch.where(threshold > 0, threshold, 1)
        return (1 - torch.exp(-strength * below_F)).clamp(max=MOST)

    def _draw(self, info: StepInfo, ranks: Ranks) -> Tensor | None:
        """Return a mask [F] of this rank's features that stay in the step; None where none can be left out."""
        if self.strength_at(info.tokens, info.total_tokens) == 0:
            return None
        generator = keyed_generator(info.seed, "temporal_mask", info.step)
        drawn = torch.rand(self.n_features, generator=generator, dtype=torch.float64)
        lo, hi = ranks.features.slice(self.n_features)
        return drawn[lo:hi].to(self.masked_F.device, non_blocking=True) >= self.masked_F

    def thresholds(self, sae: TrainableAutoencoder) -> Tensor:
        """Return 0, or +inf for a feature that `export_mask` leaves out [F]."""
        threshold_F = super().thresholds(sae)
        if not self._mask.export_mask:
            return threshold_F
        return torch.where(self.masked_F > MASKED_FROM, torch.inf, threshold_F)

    def figures(self, info: StepInfo) -> dict[str, float]:
        return super().figures(info) | {"train/masked_share": float(self._masked_share)}

    def state(self) -> State:
        return State(super().state().shared, {"averages": self.averages_F3, "masked": self.masked_F})

    def load_state(self, state: State) -> None:
        device = self.masked_F.device
        self.averages_F3, self.masked_F = (state.features[name].to(device) for name in ("averages", "masked"))
        super().load_state(state)


def _of(code: Code, allowed_F: Tensor) -> Code:
    """Return a code in which the features outside the mask [F] have value 0 and no gradient."""
    allowed = allowed_F[code.feature.long()] if isinstance(code, SparseCode) else allowed_F
    return replace(code, value=torch.where(allowed, code.value, 0))


def _sums(sae: TrainableAutoencoder, code: Code, error_ND: Tensor) -> Tensor:
    """Return the sums of values, firings and contributions over this rank's tokens [F, 3], float64."""
    if isinstance(code, SparseCode):
        along = kernels.row_products(error_ND, sae.W_dec, code.feature, code.token, code.start).double()
        value = code.value.double()
        each = torch.stack([value, (value > 0).double(), value * along + value.square() / 2], dim=1)
        return kernels.sums_by_feature(each, code.feature, n_features=sae.n_features)
    value_NF, along_NF = code.value, error_ND @ sae.W_dec.t()
    each_NF = value_NF, value_NF > 0, value_NF * along_NF + value_NF.square() / 2
    return torch.stack([each.sum(0, dtype=torch.float64) for each in each_NF], dim=1)
