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
