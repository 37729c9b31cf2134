"""TopK: every token keeps its k largest affinities (Gao et al. 2024, arXiv 2406.04093), and Multi-TopK.

Multi-TopK, of the same paper, adds the loss of a reconstruction from each token's 4 k largest affinities. Codes stay
useful where more than k features fire. The form, the factor 4 and the weight 1/8 are from a library's code.
"""

from dataclasses import replace

from sae_train import kernels
from sae_train.config import SaeConfig, TopKConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.losses import reconstruct
from sae_train.sae.nesting import prefix_sizes
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.allocator import Allocator
from sae_train.sparsifiers.base import Encoding, Export

MULTIPLE = 4
"""Matches of a token in Multi-TopK's second reconstruction, as a multiple of k. Fewer where fewer are positive."""


class TopK(Allocator):
    """Keeps round(k) matches a token. With `multi_weight` a reconstruction from 4 times as many adds a loss."""

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        assert isinstance(config.sparsifier, TopKConfig)
        self._multi_weight = config.sparsifier.multi_weight
        self._prefixes = prefix_sizes(config.nesting, n_features=sizes.n_features) if self._multi_weight else ()

    @staticmethod
    def budget_of(k: float, n_tokens: int) -> int:
        return round(k) * n_tokens

    def encode(self, sae: TrainableAutoencoder, inputs: StepInputs) -> Encoding:
        encoding, x_ND, info = super().encode(sae, inputs), inputs.x_ND, inputs.info
        if self._multi_weight == 0:
            return encoding
        most, now = (MULTIPLE * round(k) for k in (self.schedule.most, self.schedule.at(info)))
        wide = self._largest(inputs, k=now, capacity=len(x_ND) * min(most, sae.n_features))
        code = sae.attach(x_ND, wide)
        sizes, n_tokens = self._prefixes, info.batch_tokens
        _, loss = reconstruct(sae, x_ND, code, sizes=sizes, n_tokens=n_tokens, ranks=inputs.ranks)
        return encoding._replace(penalty=self._multi_weight * loss)

    def select(self, inputs: StepInputs) -> SparseCode:
        return self._largest(inputs, k=round(self.schedule.at(inputs.info)), capacity=self.capacity)

    def _largest(self, inputs: StepInputs, *, k: int, capacity: int) -> SparseCode:
        matches = kernels.select_rows(
            inputs.pre_NF, k=k, capacity=capacity, n_features=self.n_features, ranks=inputs.ranks
        )
        return self.code(matches, inputs)

    def export(self, sae: TrainableAutoencoder, info: StepInfo) -> Export:
        return replace(super().export(sae, info), inference="topk")
