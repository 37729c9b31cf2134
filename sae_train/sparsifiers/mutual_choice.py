"""Mutual Choice: the batch keeps its k x tokens largest affinities, wherever they are.

Ayonrinde 2024 (arXiv 2411.02124). The same selector is BatchTopK (Bussmann et al. 2024, arXiv 2412.06410).
"""

from sae_train import kernels
from sae_train.sae.code import SparseCode
from sae_train.sae.step_info import StepInputs
from sae_train.sparsifiers.allocator import Allocator


class MutualChoice(Allocator):
    """One budget for the batch. Neither tokens nor features have a budget of their own."""

    def select(self, inputs: StepInputs) -> SparseCode:
        matches = kernels.select_batch(
            inputs.pre_NF,
            budget=self.budget(inputs.info),
            capacity=self.capacity,
            n_features=self.n_features,
            ranks=inputs.ranks,
        )
        return self.code(matches, inputs)
