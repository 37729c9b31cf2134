"""TopK: every token keeps its k largest affinities (Gao et al. 2024, arXiv 2406.04093), and their Multi-TopK.

Multi-TopK, of the same paper, adds the loss of a reconstruction from each token's 4 k largest affinities, so that codes
stay sane where more features fire than k. The form, 4 and the weight 1/8 are from a library's code.
"""

from torch import Tensor

from sae_train import kernels
from sae_train.config import RunConfig, TopKConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.nesting import prefix_sizes, reconstruct
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.base import Allocator

MULTIPLE = 4
"""How many times k matches a token has in Multi-TopK's second reconstruction (fewer where fewer are positive)."""


class TopK(Allocator):
    """Keeps round(k) matches a token; with `multi_weight` the loss of 4 times as many counts, too."""

    inference = "topk"

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        super().__init__(config, n_features=n_features)
        assert isinstance(config.sparsifier, TopKConfig)
        self._multi_weight = config.sparsifier.multi_weight
        if self._multi_weight:
            self.kept_a_token *= MULTIPLE
        self._prefixes = prefix_sizes(config.nesting, n_features=n_features) if self._multi_weight else ()

    def slots(self, k: float, n_tokens: int) -> int:
        return round(k) * n_tokens

    def encode(
        self,
        dictionary: TrainableAutoencoder,
        x_ND: Tensor,
        pre_NF: kernels.PreActivations,
        *,
        info: StepInfo,
        firing: Firing,
        ranks: Ranks,
    ) -> tuple[Code, Tensor | None]:
        code, _ = super().encode(dictionary, x_ND, pre_NF, info=info, firing=firing, ranks=ranks)
        if self._multi_weight == 0:
            return code, None
        most, now = (MULTIPLE * round(k) for k in (max(self.k, self.start_k), self.k_at(info)))
        capacity = len(x_ND) * min(most, dictionary.n_features)
        wide = dictionary.attach(x_ND, self._rows(pre_NF, now, capacity, ranks))
        _, loss = reconstruct(dictionary, x_ND, wide, sizes=self._prefixes, n_tokens=info.batch_tokens, ranks=ranks)
        return code, self._multi_weight * loss

    def select(self, pre_NF: kernels.PreActivations, *, info: StepInfo, firing: Firing, ranks: Ranks) -> SparseCode:
        return self._rows(pre_NF, round(self.k_at(info)), self.capacity, ranks)

    def _rows(self, pre_NF: kernels.PreActivations, k: int, capacity: int, ranks: Ranks) -> SparseCode:
        matches = kernels.select_rows(pre_NF, k=k, capacity=capacity, n_features=self.n_features, ranks=ranks)
        return self.code(matches, pre_NF)
