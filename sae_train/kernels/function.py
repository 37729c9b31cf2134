"""Autograd functions of our own, called with types: torch leaves `Function.apply` untyped."""

from typing import Any

from torch import Tensor
from torch.autograd import Function


def applied(function: type[Function], *inputs: Any) -> Tensor:
    """Return what an autograd function of one output makes of its inputs, with a graph where one asks for it."""
    output: Tensor = function.apply(*inputs)
    return output
