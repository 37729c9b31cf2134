"""Hooks on one module of a language model, which read or replace its first tensor, or end the forward pass there.

Letters: B contexts, T positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sae_train.errors import ConfigError


class Reached(Exception):
    """Ends a forward pass at its site. Only the call whose hook raised it catches it."""


@contextmanager
def hooked(model: nn.Module, module: str, side: str, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call `function` with the site's tensor when it is first computed.

    A tensor that it returns replaces the site's for the rest of the forward pass. The hook is removed at the end of the
    block, also after an error.
    """
    calls: list[bool] = []

    def once(tensor: Tensor) -> Tensor | None:
        if calls:
            return None
        calls.append(True)
        return function(tensor)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return once(output)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            replaced = once(output[0])
            return None if replaced is None else type(output)([replaced, *output[1:]])
        raise ConfigError(f"layer.path={module}: its output is a {type(output).__name__}, not a tensor. "
                          "Choose a module inside it.")  # fmt: skip

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            replaced = once(args[0])
            return None if replaced is None else ((replaced, *args[1:]), kwargs)
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                replaced = once(value)
                return None if replaced is None else (args, {**kwargs, key: replaced})
        raise ConfigError(f"layer.path={module}: it takes no tensor. Choose a module inside it.")

    target = model.get_submodule(module)
    if side == "output":
        handle = target.register_forward_hook(after)
    else:
        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run_until(model: nn.Module, module: str, side: str, ids_BT: Tensor) -> Tensor | None:
    """Return the site's tensor without running the rest of the model, or None where the site never runs."""
    captured: list[Tensor] = []
    reached = Reached()

    def take(tensor: Tensor) -> Tensor | None:
        captured.append(tensor)
        raise reached

    try:
        with hooked(model, module, side, take):
            model(ids_BT)
    except Reached as caught:
        if caught is not reached:
            raise
    return captured[0] if captured else None
