"""Centre, scale and outlier limit of raw activations, fixed once from the stream's first tokens.

Normalised activations have a mean squared norm of 1. The scaling is linear, so the export folds it into the weights.
The outlier limit is ten times the median norm of the calibration tokens; `filter.py` says why there is one.

Where gradients of the language model's loss are harvested, they are divided by their own root mean square norm, one
constant of the whole run. A gradient at the normalised activation would be another multiple of the same vector.
Letters: N tokens, D d_model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.batch import Batch
from sae_train.ranks.interface import Ranks

OUTLIER_FACTOR = 10.0
_LEAST_RELATIVE_SPREAD = 1e-7
"""Smallest spread over the mean's norm. A smaller one is rounding of equal fp32 numbers."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The map from raw to normalised activations. A stream fits it once; batches and the export use it."""

    centre_D: Tensor
    """[D] float64 mean of the calibration tokens, on the device of the activations."""
    scale: float
    """Root mean squared norm of the centred calibration tokens."""
    limit: float
    """Largest raw norm that is trained on."""
    gamma: float
    """Norm of the mean over `scale`: the distance of the activations from the origin."""
    gradient_scale: float | None = None
    """Root mean squared norm of the calibration tokens' gradients. None where none are harvested."""

    def normalise(self, raw_ND: Tensor, gradient_ND: Tensor | None = None) -> Batch:
        """Return (raw - centre) / scale and gradient / gradient_scale.

        Results are float64 for float64 tensors and float32 for all others.
        """
        dtype = torch.float64 if raw_ND.dtype == torch.float64 else torch.float32
        x_ND = (raw_ND.to(dtype) - self.centre_D.to(raw_ND.device, dtype)).div_(self.scale)
        if gradient_ND is None:
            return Batch(x_ND)
        assert self.gradient_scale is not None
        return Batch(x_ND, gradient_ND.to(dtype) / self.gradient_scale)

    def state(self) -> dict[str, Tensor]:
        """Return the scaling as CPU tensors."""
        numbers = [self.scale, self.limit, self.gamma]
        numbers += [] if self.gradient_scale is None else [self.gradient_scale]
        return {"scaling_centre": self.centre_D.cpu(), "scaling_numbers": torch.tensor(numbers, dtype=torch.float64)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], *, device: torch.device) -> "Scaling":
        """Return the scaling whose `state` is given."""
        scale, limit, gamma, *rest = state["scaling_numbers"].tolist()
        centre_D = state["scaling_centre"].to(device)
        return cls(centre_D=centre_D, scale=scale, limit=limit, gamma=gamma, gradient_scale=rest[0] if rest else None)


def states_of(scalings: Mapping[str, Scaling]) -> dict[str, Tensor]:
    """Return the scalings of several sites, given by label, as CPU tensors."""
    return {f"{name}/{label}": value for label, scaling in scalings.items() for name, value in scaling.state().items()}


def from_states(state: Mapping[str, Tensor], labels: Iterable[str], *, device: torch.device) -> dict[str, Scaling]:
    """Return the scalings of `labels`, whose `states_of` is given."""
    names = ("scaling_centre", "scaling_numbers")
    return {
        label: Scaling.from_state({name: state[f"{name}/{label}"] for name in names}, device=device) for label in labels
    }


def fit_scaling(
    parts: Sequence[Tensor], *, ranks: Ranks, site: str, gradients: Sequence[Tensor] | None = None
) -> Scaling:
    """Return the scaling of calibration tokens. Collective.

    Sums are taken over each part, then over all parts in order, so the result does not depend on the rank count.

    Args:
        parts: this rank's parts (one a lane), each [n, D] raw and finite. All parts of all ranks have the same n.
        ranks: the ranks, with parts in rank order.
        site: name of the activations' source, for messages.
        gradients: the gradients of the same tokens in the same parts. None where none are harvested.

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
