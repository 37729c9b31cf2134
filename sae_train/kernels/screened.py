"""Pre-activations that a product in bf16 has screened (screen.py), and what selection asks of them.

Letters: N tokens, F features, D width, P padded width, C candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_train.kernels.affine import affine
from sae_train.kernels.backend import uses_numba
from sae_train.kernels.matches import few_reaching, flat_reaching, kept
from sae_train.kernels.products import row_products
from sae_train.kernels.radix import kth_largest, positive
from sae_train.ranks.interface import Solo

FEW = 1 / 48
"""Share of kept entries up to which computing them twice costs less than a whole product does."""
MANY = 1 / 16
"""Share of candidates from which on the whole product costs less than theirs one by one."""
ROUNDOFF = 2.0**-8
"""Relative error of a normal number that is rounded to bf16, at most."""
TINY = 2.0**-126
"""The least normal number: AMX takes smaller ones for zero."""
SUM_ROUNDOFF = 2.0**-23
"""Of two fp32 sums of the same products, the near one and the exact one, relative to the sum of magnitudes and a
summand: 2^-24 each. The bias is one more summand of the near one; adding it to the exact one is one more rounding,
relative to the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """Pre-activations x W^T + b [N, F] near enough to tell which matter; `exact` gives those.

    Attributes:
        near_NF: bf16, from fp32 sums over factors rounded to bf16; NaN where an exact one is.
        x_NP: factors of the exact ones in their first `width` columns: fp32, or bf16 where the run's precision says so.
        W_FP: alike.
        b_F: fp32.
        width: D.
        error_N1: how far a token's near pre-activations were from the exact ones at most, before the sum was rounded.
        error_1F: the same of a feature's.
    """

    near_NF: Tensor
    x_NP: Tensor
    W_FP: Tensor
    b_F: Tensor
    width: int
    error_N1: Tensor
    error_1F: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.near_NF.shape[0], self.near_NF.shape[1]

    @property
    def x_ND(self) -> Tensor:
        """Rows of the exact ones, fp32."""
        return self.x_NP[:, : self.width].float()

    @property
    def W_FD(self) -> Tensor:
        """Rows of the exact ones, fp32."""
        return self.W_FP[:, : self.width].float()

    def exact(self, index_C: Tensor) -> Tensor:
        """Return the exact pre-activations at ascending flat indices [C]."""
        if uses_numba(self.b_F):
            from sae_train.kernels import numba_products

            return numba_products.entries(self.x_NP, self.W_FP, self.b_F, index_C, width=self.width)
        n_tokens, n_features = self.shape
        token = torch.div(index_C, n_features, rounding_mode="floor")
        feature = (index_C - token * n_features).int()
        start = torch.searchsorted(token, torch.arange(n_tokens + 1), out_int32=True)
        return row_products(self.x_ND, self.W_FD, feature, token.int(), start).add_(self.b_F[feature])

    def columns(self, members: Tensor) -> Tensor:
        """Return the exact pre-activations of some features [N, len(members)]."""
        W_CD = self.W_FP[members, : self.width].float()
        return affine(self.x_ND, W_CD, self.b_F[members], precision="float32")

    @property
    def bits_NF(self) -> Tensor:
        """The near ones' bits, int16: positive floats are in order as integers, below infinity and any NaN."""
        return self.near_NF.view(torch.int16)

    def lows(self, bits: Tensor, error: Tensor) -> Tensor:
        """Return what exact pre-activations reach at least, whose near ones' bits are given, if those are positive.

        Args:
            error: `error_N1` or `error_1F`, whichever holds for them.
        """
        return bits.view(torch.bfloat16).float() * (1 - ROUNDOFF) - error

    def whole(self) -> Tensor:
        """Return all exact pre-activations [N, F]."""
        return affine(self.x_ND, self.W_FD, self.b_F, precision="float32")

    def leading(self, k: int, *, size: int) -> tuple[Tensor, Tensor]:
        """Return flat index (ascending) and exact value of positive entries, the k largest of each row among them.

        Where Numba compiles, that is. `size`: of the groups whose maxima say what is surely not among those.
        """
        from sae_train.kernels import numba_leading

        bound_N1, index = numba_leading.leading_of_rows(
            self.near_NF, self.error_N1, k, size=size, of_near=1 - ROUNDOFF, of_exact=1 - 2 * SUM_ROUNDOFF
        )
        return self._exact_reaching(bound_N1, index)

    def reaching(self, bound: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return flat index (ascending) and exact value of the positive entries that reach `bound`.

        Args:
            bound: scalar, [N, 1] or [1, F].
            error: `error_N1` or `error_1F`.
        """
        return self._exact_reaching(bound, flat_reaching(self.near_NF, _lowered(bound, error)))

    def _exact_reaching(self, bound: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the entries at `index` reach `bound`, and their exact values."""
        index = self._candidates(bound, index)
        if self._are_many(index):
            whole_NF = self.whole()
            index = flat_reaching(whole_NF, positive(bound))
            return index, whole_NF.reshape(-1)[index]
        return self._one_by_one(bound, index)

    def few_reaching(self, bound: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what `reaching` does for a scalar, or None where too many may reach it to compute them one by one."""
        index = self._candidates(bound, flat_reaching(self.near_NF, _lowered(bound, self.error_N1)))
        return None if self._are_many(index) else self._one_by_one(bound, index)

    def largest(self, k: int, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Return flat index (ascending) and exact value of entries that reach `bound`, the k largest among them.

        Where many may be, the whole product says which few, near as it is: it sums in another order. So an exact value
        is the same number whatever the bound. (All of a batch that is 0 but for rounding are computed one by one.)

        Args:
            bound: a scalar that k positive entries of all ranks reach, or 0.
        """
        found = self.few_reaching(bound)
        if found is not None:
            return found
        whole_NF, error_1F = self.whole(), self._error_of_order()
        index = flat_reaching(whole_NF, bound - error_1F)
        near, error = whole_NF.reshape(-1)[index], error_1F.squeeze(0)[index.remainder(self.shape[1])]
        surely = kth_largest(near - error, k, Solo(near.device))
        return self._one_by_one(bound, index[near + error >= surely])

    def _candidates(self, bound: Tensor, index: Tensor) -> Tensor:
        """Return which of the entries at `index` may reach `bound`; many are looked at once more."""
        return self._near_to_both(index, bound) if len(index) > FEW * self.near_NF.numel() else index

    def _are_many(self, index: Tensor) -> bool:
        return len(index) > MANY * self.near_NF.numel()

    def _one_by_one(self, bound: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the entries at `index` reach `bound`, and their exact values."""
        value = self.exact(index)
        return kept(index, value, self._reached(positive(bound), index, value))

    def _error_of_order(self) -> Tensor:
        """Return how far a feature's sums of the same products in two orders may be from each other [1, F]."""
        summands = self.width + 3  # the bias, and what comes of adding and subtracting this
        norm_N, norm_F = self.x_ND.norm(dim=1), self.W_FD.norm(dim=1)
        sums_F = SUM_ROUNDOFF * summands * (norm_N.max() * norm_F + self.b_F.abs())
        error_F: Tensor = sums_F + summands * TINY * (1 + norm_N.max() + norm_F)
        return error_F.unsqueeze(0)

    def above(self, bound_F: Tensor, *, most: float) -> tuple[Tensor, Tensor] | None:
        """Return flat index (ascending) and exact value of the entries above their feature's bound, positive or not.

        None where more than `most` entries may be.
        """
        bound_1F = bound_F.expand(self.shape[1]).unsqueeze(0)
        index = few_reaching(self.near_NF, _lowered(bound_1F, self.error_1F), most=most)
        if index is None:
            return None
        value = self.exact(index)
        return kept(index, value, value > self._of_entries(bound_1F, index))

    def _near_to_both(self, index_C: Tensor, bound: Tensor) -> Tensor:
        """Return the candidates that the smaller of their token's and their feature's error leaves."""
        token = torch.div(index_C, self.shape[1], rounding_mode="floor")
        error_N, error_F = self.error_N1.squeeze(1), self.error_1F.squeeze(0)
        error_C = torch.minimum(error_N[token], error_F[index_C - token * self.shape[1]])
        near_bound_C = _lowered(self._of_entries(bound, index_C), error_C)
        return index_C[self.near_NF.reshape(-1)[index_C] >= near_bound_C]

    def _reached(self, bound: Tensor, index_C: Tensor, value_C: Tensor) -> Tensor:
        """Return which of these entries reach the bound, scalar, [N, 1] or [1, F]."""
        if bound.dim() == 0 or not uses_numba(value_C, bound):
            return value_C >= self._of_entries(bound, index_C)
        from sae_train.kernels import numba_cut

        return numba_cut.reaching(index_C, value_C, bound, n_features=self.shape[1])

    def _of_entries(self, bound: Tensor, index_C: Tensor) -> Tensor:
        """Return the bound, scalar, [N, 1] or [1, F], of each of these entries."""
        if bound.dim() == 0:
            return bound
        token = torch.div(index_C, self.shape[1], rounding_mode="floor")
        return bound.expand(self.shape)[token, index_C - token * self.shape[1]]


def _lowered(bound: Tensor, error: Tensor) -> Tensor:
    """Return the bound that near pre-activations reach where exact ones reach `bound`; rounding keeps the order."""
    return (bound * (1 - 2 * SUM_ROUNDOFF * bound.sign()) - error).bfloat16()


PreActivations = Tensor | Screened
"""What selection selects from."""
