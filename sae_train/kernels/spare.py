"""Memory of one step's gradients for the next one's: as much, asked for anew, costs thousands of page faults."""

from collections.abc import Iterable

from torch import Tensor


class Spare:
    """Tensors that were lent and have been given back."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._lent: set[int] = set()

    def take(self, shape: tuple[int, ...], *, like: Tensor) -> Tensor:
        """Return a tensor to write to, of `like`'s dtype and device; what it holds is left over from before."""
        fits = (each for each in self._kept if each.shape == shape and each.dtype == like.dtype)
        found = next(fits, None)
        self._kept = [each for each in self._kept if each is not found]
        if found is None:
            found = like.new_empty(shape)
        self._lent.add(found.data_ptr())
        return found

    def keep(self, gradients: Iterable[Tensor]) -> None:
        """Take back what was lent and nobody else uses any more; the rest of what was lent is forgotten."""
        self._kept += [each for each in gradients if each.data_ptr() in self._lent]
        self._lent.clear()
