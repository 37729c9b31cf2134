"""Mutual Choice: the batch keeps its k x tokens largest affinities, wherever they are.

Ayonrinde 2024 (arXiv 2411.02124); the same selector is BatchTopK (Bussmann et al. 2024, arXiv 2412.06410).
"""

from sae_train import kernels
from sae_train.config import RunConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.step_info import StepInfo
from sae_train.sparsifiers.base import Allocator


class MutualChoice(Allocator):
    """One budget for the batch; neither tokens nor features have one of their own."""

    inference = "threshold"

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        super().__init__(config, n_features=n_features)
        self._hint = kernels.Hint()

    def select(self, pre_NF: kernels.PreActivations, *, info: StepInfo, firing: Firing, ranks: Ranks) -> SparseCode:
        budget = self.slots(self.k_at(info), info.batch_tokens)
        matches = kernels.select_batch(
            pre_NF,
            budget=budget,
            capacity=self.capacity,
            n_features=self.n_features,
            ranks=ranks,
            hint=self._hint,
        )
        return self.code(matches, pre_NF)
