"""A typed call of custom autograd functions."""

from typing import Any

from torch import Tensor
from torch.autograd import Function


def applied(function: type[Function], *inputs: Any) -> Tensor:
    """Return `function.apply(*inputs)` of an autograd function with one output; torch leaves `apply` untyped."""
    output: Tensor = function.apply(*inputs)
    return output
