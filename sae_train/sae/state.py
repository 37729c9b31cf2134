"""What a checkpoint keeps of a part of one SAE."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class State(NamedTuple):
    """Tensors by name that a part of an SAE needs to continue a run.

    A part returns one from `state()` and takes it in `load_state()`. Checkpoints store it; see training/checkpoint.py.
    """

    shared: dict[str, Tensor]
    """Equal on every rank."""
    features: dict[str, Tensor]
    """One row a feature, of the features that this rank holds: [hi - lo, ...]."""

    def part(self, name: str) -> "State":
        """Return the tensors of one part of a `joined` state, without the part's name."""
        return State(_below(name, self.shared), _below(name, self.features))


def joined(parts: dict[str, State]) -> State:
    """Return the states of several parts as one, with names such as 'optimizer/W_enc.exp_avg'."""
    return State(
        _named((name, state.shared) for name, state in parts.items()),
        _named((name, state.features) for name, state in parts.items()),
    )


def _named(parts: Iterable[tuple[str, dict[str, Tensor]]]) -> dict[str, Tensor]:
    return {f"{part}/{name}": value for part, values in parts for name, value in values.items()}


def _below(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{part}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
