"""Hooks on modules of a language model, which read or replace their first tensor, or end the forward pass.

Letters: B contexts, T positions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from sae_train.errors import ConfigError


class Reached(Exception):
    """Ends a forward pass at its site. Only the call whose hook raised it catches it."""


class Place(NamedTuple):
    """A tensor of a language model, by the module that makes or takes it. `SiteFacts` holds one; hooks read it."""

    module: str
    """Dotted name of the module."""
    side: str
    """'output' or 'input' of the module."""


@contextmanager
def hooked(
    model: nn.Module, places: Mapping[str, Place], function: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `function` with a place's label and tensor when the tensor is first computed.

    A tensor that it returns replaces the place's for the rest of the forward pass. The hooks are removed at the end of
    the block, also after an error.
    """
    with ExitStack() as stack:
        for label, place in places.items():
            stack.enter_context(hooked_always(model, place, _once(partial(function, label))))
        yield


def _once(function: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    """Return a function that calls `function` the first time and returns None from then on."""
    calls: list[bool] = []

    def once(tensor: Tensor) -> Tensor | None:
        if calls:
            return None
        calls.append(True)
        return function(tensor)

    return once


@contextmanager
def hooked_always(model: nn.Module, place: Place, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `function` with the tensor of one place whenever it is computed; see `hooked`."""

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return function(output)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            replaced = function(output[0])
            return None if replaced is None else type(output)([replaced, *output[1:]])
        raise ConfigError(f"layer.path={place.module}: its output is a {type(output).__name__}, not a tensor. "
                          "Choose a module inside it.")  # fmt: skip

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            replaced = function(args[0])
            return None if replaced is None else ((replaced, *args[1:]), kwargs)
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                replaced = function(value)
                return None if replaced is None else (args, {**kwargs, key: replaced})
        raise ConfigError(f"layer.path={place.module}: it takes no tensor. Choose a module inside it.")

    target = model.get_submodule(place.module)
    if place.side == "output":
        handle = target.register_forward_hook(after)
    else:
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run_until(model: nn.Module, places: Mapping[str, Place], ids_BT: Tensor) -> dict[str, Tensor]:
    """Return the tensor of each place by its label, without running the model beyond the last of them.

    A place that the forward pass never reaches is absent.
    """
    found: dict[str, Tensor] = {}
    reached = Reached()

    def take(label: str, tensor: Tensor) -> Tensor | None:
        is_last = len(found) + 1 == len(places)
        found[label] = tensor if is_last else tensor.clone()  # the rest of the model may write into the tensor
        if is_last:
            raise reached
        return None

    try:
        with hooked(model, places, take):
            model(ids_BT)
    except Reached as caught:
        if caught is not reached:
            raise
    return found
