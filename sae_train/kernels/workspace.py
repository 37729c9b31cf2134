"""What one step leaves for the next: memory, which asked for anew costs thousands of page faults, and findings."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Workspace:
    """Memory for gradients, lent and given back; and what was found of tensors on the way, until they change."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._lent: set[int] = set()
        self._notes: dict[str, tuple[torch.UntypedStorage, tuple[Any, ...], Any]] = {}

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        """Let copies begin with nothing: what is noted goes by addresses."""
        return Workspace, ()

    def take(self, shape: tuple[int, ...], *, like: Tensor) -> Tensor:
        """Return a tensor to write to, of `like`'s dtype and device; what it holds is left over from before."""
        wanted = shape, like.dtype, like.device
        found = next((each for each in self._kept if (each.shape, each.dtype, each.device) == wanted), None)
        self._kept = [each for each in self._kept if each is not found]
        if found is None:
            found = like.new_empty(shape)
        self._lent.add(found.data_ptr())
        return found

    def keep(self, gradients: Iterable[Tensor]) -> None:
        """Take back what was lent, and only that is kept: the caller promises that nobody else uses it any more."""
        self._kept = [each for each in gradients if each.data_ptr() in self._lent]
        self._lent.clear()

    def note(self, of: Tensor, **findings: Any) -> None:
        """Remember what was found of a tensor; by one name of one tensor, the last."""
        for name, finding in findings.items():
            # with its storage: as long as that lives, no other tensor has the address
            self._notes[name] = of.untyped_storage(), _state(of), finding

    def noted(self, of: Tensor, name: str) -> Any:
        """Return what was found of a tensor by that name; None where it was not.

        Nor where the tensor has changed since, by any operation that torch counts (`Tensor._version`).
        """
        note = self._notes.get(name)
        return None if note is None or note[1] != _state(of) else note[2]


def _state(of: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from all others that live, and from what it was before."""
    return of.data_ptr(), of.shape, of.stride(), of.dtype, None if of.is_inference() else of._version
