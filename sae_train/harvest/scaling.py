"""Centre, scale and outlier limit of raw activations, fixed once from the stream's first tokens.

Normalised activations have a mean squared norm of 1; the scaling is linear, so the export
folds it into the weights. A few tokens carry norms 10 to 1000 times the rest (attention sinks); one of them
would absorb a batch's budget, so rows above ten times the median norm are left out, here and in training.

Where gradients are harvested a row is twice as wide: the activation, then the gradient of the language model's loss
there. The activation alone decides what is left out. The gradient is divided by its own root mean square norm, one
constant of the whole run: with respect to the normalised activation it would be another multiple of the same.
Letters: N tokens, D d_model, W width of a row: D or 2 D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.errors import DataError
from sae_train.ranks.interface import Ranks

OUTLIER_FACTOR = 10.0
_LEAST_RELATIVE_SPREAD = 1e-7
"""Below this share of the mean's norm, a spread is rounding of fp32 numbers that are all the same."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What turns raw activations into normalised ones."""

    centre_D: Tensor
    """[D] float64 mean of the calibration tokens, on the device of the activations."""
    scale: float
    """Root mean squared norm of the centred calibration tokens."""
    limit: float
    """Largest raw norm that is trained on."""
    gamma: float
    """Norm of the mean over `scale`: how far off the origin the activations sit."""
    gradient_scale: float | None = None
    """Root mean squared norm of the calibration tokens' gradients; None where rows hold none."""

    def normalise(self, raw_NW: Tensor) -> Tensor:
        """Return (raw - centre) / scale, float64 for float64 activations and fp32 for all others.

        The gradients of rows that hold them are divided by `gradient_scale`.
        """
        dtype = torch.float64 if raw_NW.dtype == torch.float64 else torch.float32
        centre_D = self.centre_D.to(raw_NW.device, dtype)
        if self.gradient_scale is None:
            return (raw_NW.to(dtype) - centre_D).div_(self.scale)
        raw_ND, gradient_ND = raw_NW.to(dtype).split(len(centre_D), dim=-1)
        return torch.cat([(raw_ND - centre_D) / self.scale, gradient_ND / self.gradient_scale], dim=-1)

    def normalise_rows(self, halves: Sequence[kernels.Table], index_N: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Return what `normalise` does, on a CPU, of rows [N, W] that are read in fp32 or float64.

        Args:
            halves: activations, and gradients where rows hold them.
        """
        centre_D = self.centre_D.to(dtype)
        found = [halves[0].normalised(index_N, centre_D, self.scale)]
        if self.gradient_scale is not None:
            found.append(halves[1].normalised(index_N, torch.zeros_like(centre_D), self.gradient_scale))
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

    def keeps(self, raw_NW: Tensor) -> Tensor:
        """Return [...] bool: which rows' activations are of a norm within the limit."""
        return row_norms(raw_NW[..., : len(self.centre_D)]) <= self.limit

    def state(self) -> dict[str, Tensor]:
        """Return the scaling as CPU tensors."""
        known = [self.scale, self.limit, self.gamma, *([] if self.gradient_scale is None else [self.gradient_scale])]
        return {"scaling_centre": self.centre_D.cpu(), "scaling_numbers": torch.tensor(known, dtype=torch.float64)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], *, device: torch.device) -> "Scaling":
        """Rebuild what `state` returned."""
        scale, limit, gamma, *rest = state["scaling_numbers"].tolist()
        centre_D = state["scaling_centre"].to(device)
        return cls(centre_D=centre_D, scale=scale, limit=limit, gamma=gamma, gradient_scale=rest[0] if rest else None)


def row_norms(raw_ND: Tensor) -> Tensor:
    """Return [...] norms, float64 for float64 activations and fp32 for all others."""
    dtype = torch.float64 if raw_ND.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(raw_ND, dim=-1, dtype=dtype)
    return norms


def fit_scaling(
    parts: Sequence[Tensor], *, ranks: Ranks, site: str, gradients: Sequence[Tensor] | None = None
) -> Scaling:
    """Fix the scaling from calibration tokens.

    Args:
        parts: this rank's parts (one a lane), each [n, D] raw and finite; n is the same for all parts and ranks.
            Sums are taken a part, then over all parts in order, so the result does not depend on the rank count.
        ranks: with parts in rank order.
        site: what the activations are, for messages.
        gradients: of the same tokens, likewise; None where none are harvested.

    Raises:
        DataError: the activations are constant, or more than half of them are zero, or all gradients are.
    """
    norms = [torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64) for part in parts]
    every_norm = ranks.gather(torch.stack(norms)).flatten()
    median = float(every_norm.median())
    if median == 0:
        raise DataError(
            f"{site}: more than half of the calibration tokens have all-zero activations, so they cannot be scaled. "
            "Choose another site or source."
        )
    limit = OUTLIER_FACTOR * median
    kept = [part[norm <= limit] for part, norm in zip(parts, norms, strict=True)]
    counts = torch.tensor([len(part) for part in kept], device=every_norm.device)
    count = int(ranks.gather(counts).sum())
    sums = torch.stack([_sum_rows(part, lambda rows_ND: rows_ND) for part in kept])
    centre_D = ranks.gather(sums).flatten(0, 1).sum(0) / count
    squares = torch.stack([_sum_rows(part, lambda rows_ND: (rows_ND - centre_D).square()).sum() for part in kept])
    scale = float((ranks.gather(squares).flatten().sum() / count).sqrt())
    offset = float(centre_D.norm())
    if not scale > _LEAST_RELATIVE_SPREAD * max(offset, median):
        raise DataError(
            f"{site}: the calibration tokens all have the same activation, so there is nothing to learn. "
            "Choose another site or source."
        )
    scaling = Scaling(centre_D=centre_D, scale=scale, limit=limit, gamma=offset / scale)
    if gradients is None:
        return scaling
    kept = [part[norm <= limit] for part, norm in zip(gradients, norms, strict=True)]
    squares = torch.stack([_sum_rows(part, torch.square).sum() for part in kept])
    gradient_scale = float((ranks.gather(squares).flatten().sum() / count).sqrt())
    if not gradient_scale > 0:
        raise DataError(
            f"{site}: the gradients of the calibration tokens are all zero, so sparsifier=gradient has nothing to go "
            "by. Choose another site or source, or another sparsifier, such as topk."
        )
    return replace(scaling, gradient_scale=gradient_scale)


def _sum_rows(raw_ND: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the float64 sum [D] of a term of each row, without a float64 copy of all rows."""
    total = raw_ND.new_zeros(raw_ND.shape[1], dtype=torch.float64)
    for rows_ND in torch.split(raw_ND, _ROWS_AT_ONCE):
        total += term(rows_ND.double()).sum(0)
    return total
