"""The tensors that a part of a learner saves in a checkpoint."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor


class State(NamedTuple):
    """The saved tensors of one part, by name. `Stateful.load_state` takes both mappings merged, so names are unique."""

    shared: Mapping[str, Tensor] = {}
    """Tensors that are equal on every rank."""
    by_feature: Mapping[str, Tensor] = {}
    """Tensors [F, ...] of this rank's features. A resumed run may spread features over other ranks."""


class Stateful(Protocol):
    """A part of a learner that a resumed run must restore: sparsifier, auxiliary loss or firing counters."""

    def state(self) -> State:
        """Return the tensors to save."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the tensors of `state()`, both mappings merged, on any device."""
        ...
