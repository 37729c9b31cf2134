"""What one step leaves for the next: memory, which asked for anew costs thousands of page faults, and findings."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Life = Callable[[], object | None]
"""Says whether a storage lives, by None where it does not; no other tensor has the address of one that does."""


class Workspace:
    """Memory for gradients, lent and given back; and what was found of tensors on the way, until they change."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, weakref.ref[Any]]] = []
        self._lent: dict[int, weakref.ref[Any]] = {}
        self._notes: dict[str, tuple[Life, tuple[Any, ...], Any]] = {}

    def __reduce__(self) -> tuple[type["Workspace"], tuple[()]]:
        """Let copies begin with nothing: what is noted goes by addresses."""
        return Workspace, ()

    def take(self, shape: tuple[int, ...], *, like: Tensor) -> Tensor:
        """Return a tensor to write to, of `like`'s dtype, on a CPU; what it holds is left over from before."""
        fits = [i for i, (kept, _) in enumerate(self._kept) if kept.shape == shape and kept.dtype == like.dtype]
        found, life = self._kept.pop(fits[0]) if fits else _watched(like.new_empty(shape))
        first, end = found.data_ptr(), found.data_ptr() + found.nbytes
        self._lent[first] = life
        self._notes = {name: note for name, note in self._notes.items() if not first <= note[1][0] < end}
        return found

    def keep(self, gradients: Iterable[Tensor]) -> None:
        """Take back what was lent, and only that is kept: the caller promises that nobody else uses it any more."""
        lives = ((each, self._lent.get(each.data_ptr())) for each in gradients)
        self._kept = [(each, life) for each, life in lives if life is not None and life() is not None]
        self._lent.clear()

    def note(self, of: Tensor, **findings: Any) -> None:
        """Remember what was found of a tensor; a name is that of one finding, the last."""
        life: Life | None = self._lent.get(of.data_ptr())
        if life is None or life() is None:
            life = partial(_itself, of.untyped_storage())  # the note holds the storage
        for name, finding in findings.items():
            self._notes[name] = life, _state(of), finding

    def noted(self, of: Tensor, name: str) -> Any:
        """Return what was found of a tensor by that name; None where it was not.

        Nor where the tensor has changed since, by any operation that torch counts (`Tensor._version`: not by way of
        `Tensor.data` or `numpy`, nor by optimizers that are fused), or where torch counts none (`inference_mode`).
        """
        note = self._notes.get(name)
        if note is None or of.is_inference() or note[0]() is None or note[1] != _state(of):
            return None
        return note[2]


def _itself(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return storage


def _watched(memory: Tensor) -> tuple[Tensor, weakref.ref[Any]]:
    """Return another tensor of the same memory, and what tells whether its storage lives, without a reference to it.

    Autograd adds gradients in place only where nobody else refers to their storage.
    """
    array = memory.numpy()
    return torch.from_numpy(array), weakref.ref(array)


def _state(of: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from all others that live, and from what it was before."""
    return of.data_ptr(), of.shape, of.stride(), of.dtype, None if of.is_inference() else of._version
