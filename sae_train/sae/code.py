"""Codes: which features a token fires, and how strongly; without the zeros, or with them while few are zero.

Letters: N tokens, F n_features, M slots (the capacity; `start[-1]` of them are used).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sae_train.kernels import FeatureOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseCode:
    """The matches of a batch, sorted by token, then feature; unused slots sit at the end and hold 0.

    The count of matches stays on the device (`start[-1]`): nothing here reads it back to the host.
    """

    value: Tensor
    """[M] feature values, fp32 (float64 under precision=float64); differentiable in training."""
    feature: Tensor
    """[M] int32 feature of each match."""
    token: Tensor
    """[M] int32 local token of each match."""
    start: Tensor
    """[N+1] int32: matches of token i are slots start[i] to start[i+1]."""
    shape: tuple[int, ...]
    """Leading shape of the activations that were encoded; its product is N."""
    n_features: int
    """Width F of the dictionary."""
    order: FeatureOrder = field(default_factory=FeatureOrder, repr=False, compare=False)
    """The matches by feature, for products; a code made by `dataclasses.replace` with other values shares it."""

    @property
    def count(self) -> Tensor:
        """Number of matches, a scalar int32 tensor on the device."""
        return self.start[-1]

    @property
    def n_tokens(self) -> int:
        return len(self.start) - 1

    def _all_fire(self) -> bool:
        """Return whether every slot holds a match with a positive value, where the host need not wait to know."""
        return self.value.device.type == "cpu" and len(self.value) > 0 and float(self.value.detach().min()) > 0

    def used(self) -> Tensor:
        """[M] bool: which slots hold a match."""
        return torch.arange(len(self.value), device=self.value.device) < self.count

    def dense(self) -> Tensor:
        """Return [*shape, n_features] with zeros where nothing fires. Large: for tests and for users."""
        codes = self.value.new_zeros(self.n_tokens * self.n_features)
        index = self.token.long() * self.n_features + self.feature.long()
        codes = codes.index_add(0, index, self.value)  # unused slots add 0 to entry 0
        return codes.view(*self.shape, self.n_features)

    def l0(self) -> Tensor:
        """[N] int32: how many features fire on each token (value > 0)."""
        if self._all_fire():
            return self.start.diff()
        fires = (self.value.detach() > 0).int()
        before = torch.cat([fires.new_zeros(1), fires.cumsum(0, dtype=torch.int32)])
        return before[self.start.long()].diff()

    def firing_counts(self) -> Tensor:
        """[F] int64: on how many tokens each feature fires (value > 0)."""
        if self._all_fire():
            return self.feature.bincount(minlength=self.n_features)
        fires = (self.value.detach() > 0).long()
        return torch.zeros(self.n_features, dtype=torch.int64, device=self.value.device).index_add_(
            0, self.feature.long(), fires
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseCode:
    """The code of a batch with its zeros, for as long as so many features fire that leaving them out costs more."""

    value: Tensor
    """[N, F] feature values; differentiable in training."""

    @property
    def n_tokens(self) -> int:
        return len(self.value)

    def l0(self) -> Tensor:
        """[N] int32: how many features fire on each token (value > 0)."""
        return (self.value.detach() > 0).sum(1, dtype=torch.int32)

    def firing_counts(self) -> Tensor:
        """[F] int64: on how many tokens each feature fires (value > 0)."""
        return (self.value.detach() > 0).sum(0)


Code = SparseCode | DenseCode
