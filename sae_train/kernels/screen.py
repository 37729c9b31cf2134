"""Pre-activations that a product in bf16 has screened: near ones of all pairs, exact ones of those that may be kept.

A processor with bf16 products computes the encoder's five times as fast as in fp32, and what is written and read again
is half as long. Of the result little is kept, so only that is computed once more, in fp32, a row product a pair.
The near ones come with a bound on their error, so no pair is missed: what is kept, and its values, is what the whole
product in the run's precision would have given, but for the order of its sums. That holds for factors whose squares are
fp32 numbers, neither 0 nor infinite, as those of scaled activations are.

Letters: N tokens, F features, D width, P padded width, C candidates.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.affine import affine
from sae_train.kernels.backend import has_numba, uses_numba
from sae_train.kernels.matches import few_reaching, flat_reaching, kept
from sae_train.kernels.products import row_products
from sae_train.kernels.radix import kth_largest, positive
from sae_train.kernels.workspace import Workspace
from sae_train.ranks import Solo

FEW = 1 / 48
"""Share of kept entries up to which computing them twice costs less than a whole product does."""
MANY = 1 / 16
"""Share of candidates from which on the whole product costs less than theirs one by one."""
ROUNDOFF = 2.0**-8
"""Relative error of a normal number that is rounded to bf16, at most."""
TILE = 32
"""Numbers of a row that AMX takes at once."""
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
        is the same number whatever the bound.

        Args:
            bound: a scalar that k positive entries reach, or 0.
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


def screen(
    x_ND: Tensor, W_FD: Tensor, b_F: Tensor, *, precision: str, out: Tensor, workspace: Workspace | None = None
) -> Screened:
    """Return x W^T + b, screened; good for as long as neither W nor what was written to `out` is changed.

    Args:
        x_ND: fp32.
        W_FD: fp32.
        b_F: fp32.
        precision: of what is exact: float32, or bf16 for factors rounded to that.
        out: [N, F] bf16 to write the near pre-activations to.
        workspace: which knows W's rows in bf16, and is told x's.
    """
    with torch.no_grad():
        workspace = workspace or Workspace()
        x, W = rounded_rows(x_ND, x_ND.new_ones(len(x_ND))), _known_rows(W_FD, b_F, workspace)
        if uses_numba(x_ND):
            workspace.note(x_ND, padded=x.padded)
        torch.mm(x.padded, W.padded.t(), out=out)
        return screened(out, x_ND, W_FD, b_F, rounded=(x, W), precision=precision)


class Rounded(NamedTuple):
    """Rows in bf16, and behind each a number, so that a product takes the bias in its stride."""

    padded: Tensor
    """[rows, P]: those, then zeros."""
    norm: Tensor
    """[rows] of what they were, fp32."""
    missed: Tensor
    """[rows] norms of what rounding took from them, fp32."""


def rounded_rows(rows: Tensor, last: Tensor) -> Rounded:
    """Return fp32 rows [R, D] in bf16, each with a number of `last` [R] behind it."""
    n_rows, width = rows.shape
    padded = -(-(width + 1) // TILE) * TILE
    if uses_numba(rows, last):
        from sae_train.kernels import numba_rows

        return Rounded(*numba_rows.rounded(rows, last, padded=padded))
    bf16 = rows.new_zeros(n_rows, padded, dtype=torch.bfloat16)
    bf16[:, :width], bf16[:, width] = rows, last
    return Rounded(bf16, rows.norm(dim=1), (rows - bf16[:, :width]).norm(dim=1))


def _known_rows(rows: Tensor, last: Tensor, workspace: Workspace) -> Rounded:
    """Return what `rounded_rows` does, of rows that may have been rounded when they were last written."""
    found: Rounded | None = workspace.noted(rows, "rounded")
    if found is not None:
        found.padded[:, rows.shape[1]] = last
        return found
    found = rounded_rows(rows, last)
    if uses_numba(rows):
        workspace.note(rows, rounded=found)
    return found


def screened(
    near_NF: Tensor, x_ND: Tensor, W_FD: Tensor, b_F: Tensor, *, rounded: tuple[Rounded, Rounded], precision: str
) -> Screened:
    """Return what `screen` does for near pre-activations from anywhere.

    By Cauchy and Schwarz |x^ w^ - x w| is at most |x^ - x| |w^| + |x| |w^ - w|, ^ for rounded; to it come the rounding
    of the bias and of both sums, the near one's with the bias in it.

    Args:
        rounded: rows of x and of W.
    """
    x, W = rounded
    width, x_NP, W_FP = x_ND.shape[1], x_ND, W_FD
    if precision == "bf16":
        x_NP, W_FP = x.padded, W.padded
    error_N, error_F = _errors(x, W, b_F, summands=width + 1, are_rounded=precision == "bf16")
    return Screened(
        near_NF=near_NF,
        x_NP=x_NP,
        W_FP=W_FP,
        b_F=b_F,
        width=width,
        error_N1=error_N.unsqueeze(1),
        error_1F=error_F.unsqueeze(0),
    )


def _errors(x: Rounded, W: Rounded, b_F: Tensor, *, summands: int, are_rounded: bool) -> tuple[Tensor, Tensor]:
    """Return the error of a token's near pre-activations at most [N], and of a feature's [F].

    Args:
        are_rounded: whether exact ones are of rounded rows.
    """
    if uses_numba(b_F):
        from sae_train.kernels import numba_rows

        bounds = SUM_ROUNDOFF * summands, summands * TINY
        return numba_rows.errors(x[1:], W[1:], b_F, bounds=bounds, are_rounded=are_rounded)
    near_F = b_F.bfloat16().float()
    bias_F = (b_F - near_F).abs() + SUM_ROUNDOFF * summands * near_F.abs()

    def error(norm_x: Tensor, missed_x: Tensor, norm_W: Tensor, missed_W: Tensor) -> Tensor:
        rounded_x, rounded_W = norm_x + missed_x, norm_W + missed_W
        sums = SUM_ROUNDOFF * summands * rounded_x * rounded_W
        if are_rounded:
            missed_x, missed_W = torch.zeros_like(missed_x), torch.zeros_like(missed_W)
        return missed_x * rounded_W + norm_x * missed_W + sums + summands * TINY * (1 + rounded_x + rounded_W)

    error_N = error(x.norm, x.missed, W.norm.max(), W.missed.max()) + bias_F.max()
    return error_N, error(x.norm.max(), x.missed.max(), W.norm, W.missed) + bias_F


def can_screen(*, n_features: int, kept_a_token: float, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether pre-activations are screened rather than computed whole: where that is faster.

    Args:
        n_features: of this rank.
        kept_a_token: entries that selection may keep of each token, on average.
    """
    is_plain = has_numba(device) and dtype == torch.float32
    return is_plain and kept_a_token <= FEW * n_features and has_bf16_products()


@functools.cache
def has_bf16_products() -> bool:
    """Return whether this processor has AMX, and torch's products make use of it.

    AVX-512 BF16 alone took longer than fp32 on Intel (oneDNN kept to it: 102 ms for 65); on AMD nobody has measured it.
    """
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch's own, so perhaps not for ever
    return has_amx is not None and has_amx() and torch.backends.mkldnn.is_available()
