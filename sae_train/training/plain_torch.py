"""torch's global switches as a new process has them, for a run in a process where the user may have changed them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_torch() -> Iterator[None]:
    """Set torch's switches to their defaults inside the block, and put the user's back.

    A notebook may have switched gradients off, chosen another default device or dtype, allowed TF32, or asked for
    deterministic kernels. A run must not depend on any of these.
    """
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # the context costs time at each call of torch
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(torch.set_float32_matmul_precision, precision)
        if torch.are_deterministic_algorithms_enabled():  # the function imports a compiler, so not without need
            warns = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warns)
            torch.use_deterministic_algorithms(mode=False)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        yield
