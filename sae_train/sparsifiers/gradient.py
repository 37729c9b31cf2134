"""Gradient (g-SAE): TopK whose choice also weighs the effect of a feature on the language model's loss.

Olmo et al. 2024 (arXiv 2411.10397), from a summary of the paper. We have not seen its text or code. TopK's choice is
augmented by beta * z_j * |d_j . g|: z_j is the affinity, d_j the decoder row and g the gradient of the language model's
loss with respect to the activation. So |d_j . g| is the rate at which the loss changes with the feature's value.

Inferred: the term is added to z_j (with a large beta it decides alone), values stay z_j, beta = 1, and inference, where
there are no gradients, is plain TopK. Ours: |d_j . g| is divided by its mean over all tokens and features of the batch,
so that beta and k do not depend on the unit of the gradient. Multi-TopK's wider choice is plain TopK's.
"""

from torch import Tensor, addcmul, float64, where

from sae_train import kernels
from sae_train.config import GradientConfig, SaeConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.step_info import StepInputs
from sae_train.sparsifiers.topk import TopK


class Gradient(TopK):
    """Keeps round(k) matches a token, those of the largest scores. Without gradients (beta 0) it is TopK."""

    matrices_held = 4

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        assert isinstance(config.sparsifier, GradientConfig)
        self._beta = config.sparsifier.beta
        self.reads_all = self._beta > 0  # scores are of all pairs

    def select(self, inputs: StepInputs) -> SparseCode:
        pre_NF, slope_NF = inputs.pre_NF, inputs.slope_NF
        if slope_NF is None:
            return super().select(inputs)
        assert isinstance(pre_NF, Tensor), "all pre-activations are read"
        n_tokens, ranks = inputs.info.batch_tokens, inputs.ranks
        score_NF = self._scores(pre_NF, slope_NF, n_tokens=n_tokens, ranks=ranks)
        k = round(self.schedule.at(inputs.info))
        chosen = kernels.select_rows(score_NF, k=k, capacity=self.capacity, n_features=self.n_features, ranks=ranks)
        value = where(chosen.value > 0, pre_NF[chosen.token.long(), chosen.feature.long()], 0)
        return self.code(chosen._replace(value=value), inputs)

    def _scores(self, pre_NF: Tensor, slope_NF: Tensor, *, n_tokens: int, ranks: Ranks) -> Tensor:
        """Return z + beta z |slope| / mean |slope| in the memory of the slopes [N, F]: positive where z is positive.

        The mean is over all ranks. Each rank holds tokens or features of its own.
        """
        size_NF = slope_NF.abs_()
        # a row's in fp32: of all pairs float64 would take a sixth of the step
        mean = ranks.sum(size_NF.sum(1).sum(dtype=float64)) / (n_tokens * self.n_features)
        factor = where(mean > 0, self._beta / where(mean > 0, mean, 1), 0)
        return addcmul(pre_NF, pre_NF, size_NF.mul_(factor), out=size_NF)
