"""Codes: the features that each token fires, and their values. Stored without zeros, or with them while few are zero.

Letters: N tokens, F n_features, M slots (the capacity; `start[-1]` of them are used).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_train.kernels import FeatureOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCode:
    """The matches of a batch, sorted by token, then feature. Unused slots are at the end and hold 0.

    The count of matches, `start[-1]`, stays on the device. Allocators, penalised sparsifiers and the exported
    autoencoder create codes. Losses, counters and users read them.

    Example: the codes [[0, 2, 1], [3, 0, 0]] in 4 slots are value [2, 1, 3, 0], feature [1, 2, 0, 0],
    token [0, 0, 1, 0], start [0, 2, 3].
    """

    value: Tensor
    """[M] feature values, fp32 (float64 under precision=float64), differentiable in training."""
    feature: Tensor
    """[M] int32 feature of each match."""
    token: Tensor
    """[M] int32 local token of each match."""
    start: Tensor
    """[N+1] int32: matches of token i are slots start[i] to start[i+1]."""
    shape: tuple[int, ...]
    """Leading shape of the encoded activations. Its product is N."""
    n_features: int
    """Width F of the dictionary."""
    order: FeatureOrder = field(default_factory=FeatureOrder, repr=False, compare=False)
    """The order of the matches by feature, for products. A copy by `dataclasses.replace` shares it."""

    @property
    def count(self) -> Tensor:
        """The number of matches, a scalar int32 tensor on the device."""
        return self.start[-1]

    @property
    def n_tokens(self) -> int:
        return len(self.start) - 1

    def _all_fire(self) -> bool:
        """Return whether every slot holds a match with a positive value. False where the host would have to wait."""
        return self.value.device.type == "cpu" and len(self.value) > 0 and float(self.value.detach().min()) > 0

    def used(self) -> Tensor:
        """Return a mask [M] of the slots that hold a match."""
        return torch.arange(len(self.value), device=self.value.device) < self.count

    def dense(self) -> Tensor:
        """Return dense codes [*shape, n_features], with zeros where nothing fires. For tests and users: it is large."""
        codes = self.value.new_zeros(self.n_tokens * self.n_features)
        index = self.token.long() * self.n_features + self.feature.long()
        codes = codes.index_add(0, index, self.value)  # unused slots add 0 to entry 0
        return codes.view(*self.shape, self.n_features)

    def l0(self) -> Tensor:
        """Return the number of features that fire on each token [N], int32. A feature fires with a value above 0."""
        if self._all_fire():
            return self.start.diff()
        fires = (self.value.detach() > 0).int()
        before = torch.cat([fires.new_zeros(1), fires.cumsum(0, dtype=torch.int32)])
        return before[self.start.long()].diff()

    def firing_counts(self) -> Tensor:
        """Return the number of tokens on which each feature fires [F], int64."""
        if self._all_fire():
            return self.feature.bincount(minlength=self.n_features)
        fires = (self.value.detach() > 0).long()
        return torch.zeros(self.n_features, dtype=torch.int64, device=self.value.device).index_add_(
            0, self.feature.long(), fires
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseCode:
    """The code of a batch with its zeros, for batches in which so many features fire that a sparse code costs more."""

    value: Tensor
    """[N, F] feature values, differentiable in training."""

    @property
    def n_tokens(self) -> int:
        return len(self.value)

    def l0(self) -> Tensor:
        """Return the number of features that fire on each token [N], int32. A feature fires with a value above 0."""
        return (self.value.detach() > 0).sum(1, dtype=torch.int32)

    def firing_counts(self) -> Tensor:
        """Return the number of tokens on which each feature fires [F], int64."""
        return (self.value.detach() > 0).sum(0)


Code = SparseCode | DenseCode
