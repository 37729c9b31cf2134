"""The reconstruction loss of a code, over all features or over nested prefixes of them.

A loss is a sum over the tokens of this rank, divided by a number of the global batch. Summed over the ranks that hold
other tokens (`ranks.data`) it is the loss of the batch.
"""

from typing import Any

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.kernels.function import applied
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code
from sae_train.sae.nesting import decode_prefixes
from sae_train.sae.trainable import TrainableAutoencoder


def reconstruct(
    sae: TrainableAutoencoder, x_ND: Tensor, code: Code, *, sizes: tuple[int, ...], n_tokens: int, ranks: Ranks
) -> tuple[kernels.Missed, Tensor]:
    """Return the error x - x_hat of the reconstruction from all features [N, D], and the loss, a scalar.

    The loss is the sum of `reconstruction_loss` over the prefixes.

    Args:
        sae: the features of this rank.
        x_ND: normalised activations.
        code: the code that is decoded.
        sizes: features of each prefix, as `prefix_sizes` returns them: (F,) without nesting.
        n_tokens: tokens of the global batch.
        ranks: the grid of ranks.
    """
    has_one = len(sizes) == 1
    x_hat = sae.decode(code, ranks=ranks, bias=False) if has_one else decode_prefixes(sae, code, sizes, ranks=ranks)
    missed = kernels.missed(x_ND, x_hat, sae.b_dec)
    of_all = missed if has_one else kernels.Missed(*(each[-1] for each in missed))
    return of_all, squared_error(x_hat, missed, sae.b_dec) / n_tokens


def reconstruction_loss(x_ND: Tensor, x_hat_ND: Tensor, *, n_tokens: int) -> Tensor:
    """Return the sum of squared errors of this rank's tokens over the global number of tokens, a scalar.

    On inputs of mean squared norm 1 about their centre this is the share of the variance that is missed. Gradients
    reach x_hat alone.

    Args:
        x_ND: activations.
        x_hat_ND: their reconstruction, or several [G, N, D], each of which is a summand.
        n_tokens: of the global batch.
    """
    return squared_error(x_hat_ND, kernels.missed(x_ND, x_hat_ND)) / n_tokens


def squared_error(x_hat: Tensor, missed: kernels.Missed, bias_D: Tensor | None = None) -> Tensor:
    """Return the sum of squares of what x_hat + bias has missed; differentiable in x_hat and the bias."""
    return applied(_SquaredError, x_hat, *missed, bias_D)


class _SquaredError(torch.autograd.Function):
    """One tensor of the inputs' size, backward, where torch's own operations make five."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, error: Tensor, norm: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(error)
        return norm.square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = ctx.saved_tensors
        if not ctx.needs_input_grad[3]:
            return error * (-2 * grads[0]), None, None, None
        grad, grad_bias = kernels.scaled_and_sum(error, -2 * grads[0])
        return grad, None, None, grad_bias
