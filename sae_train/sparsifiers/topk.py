"""TopK: every token keeps its k largest affinities (Gao et al. 2024, arXiv 2406.04093)."""

from torch import Tensor

from sae_train import kernels
from sae_train.ranks import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.moment import Moment
from sae_train.sparsifiers.base import Allocator


class TopK(Allocator):
    """Keeps round(k) matches a token."""

    inference = "topk"

    def slots(self, k: float, n_tokens: int) -> int:
        return round(k) * n_tokens

    def select(self, pre_NF: Tensor, *, moment: Moment, firing: Firing, ranks: Ranks) -> SparseCode:
        k = round(self.k_at(moment))
        matches = kernels.select_rows(pre_NF, k=k, capacity=self.capacity, n_features=self.n_features, ranks=ranks)
        return self.code(matches, pre_NF)
