"""What an earlier batch's selection tells the next: where to look, never what to keep."""

from torch import Tensor


class Hint:
    """The cut of an earlier batch, the same on all ranks. Results do not depend on it, so no checkpoint holds it.

    Attributes:
        cut: scalar, or None before the first batch.
    """

    cut: Tensor | None = None
