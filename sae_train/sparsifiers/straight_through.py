"""Step and JumpReLU with pseudo-gradients for the threshold (Rajamanoharan et al. 2024, arXiv 2407.14435, eq. 11, 12).

With H the unit step, a rectangle kernel R(u) = 1 where |u| < 1/2, and bandwidth e:

    d JumpReLU / d pre = H(pre - t)        d JumpReLU / d t = -(t / e) R((pre - t) / e)
    d H / d pre = 0                        d H / d t        = -(1 / e) R((pre - t) / e)

They hold for pre-activations on both sides of the threshold. A pair just below it has a gradient, but no value.
"""

from typing import Any

import torch
from torch import Tensor

from sae_train.kernels.function import applied


def jump_relu(pre: Tensor, threshold: Tensor, *, bandwidth: float) -> Tensor:
    """Return `pre` where it is above `threshold`, else 0, differentiable in both. The two have one shape.

    Example: pre [0.5, 0.1] and threshold [0.3, 0.3] give [0.5, 0].
    """
    return applied(_JumpReLU, pre, threshold, bandwidth)


def step(pre: Tensor, threshold: Tensor, *, bandwidth: float) -> Tensor:
    """Return 1 where `pre` is above `threshold`, else 0, differentiable in the threshold alone.

    Example: pre [0.5, 0.1] and threshold [0.3, 0.3] give [1, 0].
    """
    return applied(_Step, pre, threshold, bandwidth)


def reach(bandwidth: float) -> float:
    """Return the distance below the threshold within which a pair has a gradient."""
    return bandwidth / 2


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        fires = pre > threshold
        near = (pre - threshold).abs() < reach(ctx.bandwidth)
        return grads[0] * fires, grads[0] * near * (threshold / -ctx.bandwidth), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < reach(ctx.bandwidth)
        return None, grads[0] * near / -ctx.bandwidth, None
