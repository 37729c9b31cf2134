"""The reconstruction loss of a code, over all features or over nested prefixes of them.

A loss is a sum over the tokens of this rank, divided by a number of the global batch. Summed over the ranks that hold
other tokens (`ranks.data`) it is the loss of the batch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_train.kernels.function import applied
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code
from sae_train.sae.nesting import decode_prefixes
from sae_train.sae.trainable import TrainableAutoencoder


class Errors(NamedTuple):
    """The errors of a reconstruction, without a graph. G is the number of prefixes; without nesting there is no G."""

    error: Tensor
    """[G, N, D] x - x_hat, where x_hat includes the bias."""
    norm: Tensor
    """[G, N] norm of each token's error."""


@torch.no_grad()
def errors_of(x_ND: Tensor, x_hat: Tensor, bias_D: Tensor | None = None) -> Errors:
    """Return the errors of the reconstructions x_hat + bias, where x_hat is [N, D] or [G, N, D].

    Example: x [[3, 4]] and x_hat [[0, 0]] without a bias give error [[3, 4]] and norm [5].
    """
    error = x_ND - x_hat
    if bias_D is not None:
        error -= bias_D
    return Errors(error, torch.linalg.vector_norm(error, dim=-1))


def reconstruct(
    sae: TrainableAutoencoder, x_ND: Tensor, code: Code, *, sizes: tuple[int, ...], n_tokens: int, ranks: Ranks
) -> tuple[Errors, Tensor]:
    """Return the errors of the reconstruction from all features, and the loss, a scalar.

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
    errors = errors_of(x_ND, x_hat, sae.b_dec)
    of_all = errors if has_one else Errors(*(each[-1] for each in errors))
    return of_all, squared_error(x_hat, errors, sae.b_dec) / n_tokens


def reconstruction_loss(x_ND: Tensor, x_hat_ND: Tensor, *, n_tokens: int) -> Tensor:
    """Return the sum of squared errors of this rank's tokens over the global number of tokens, a scalar.

    On inputs of mean squared norm 1 about their centre this is the share of the variance that is missed. Gradients
    reach x_hat alone.

    Args:
        x_ND: activations.
        x_hat_ND: their reconstruction, or several [G, N, D], each of which is a summand.
        n_tokens: of the global batch.
    """
    return squared_error(x_hat_ND, errors_of(x_ND, x_hat_ND)) / n_tokens


def squared_error(x_hat: Tensor, errors: Errors, bias_D: Tensor | None = None) -> Tensor:
    """Return the sum of squares of the errors, a scalar, differentiable in x_hat and the bias.

    Args:
        x_hat: [N, D] or [G, N, D], with its graph.
        errors: `errors_of` x_hat + bias.
        bias_D: the bias, with its graph; None where x_hat includes it.
    """
    return applied(_SquaredError, x_hat, *errors, bias_D)


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
        grad = error * (-2 * grads[0])
        return grad, None, None, grad.flatten(0, -2).sum(0)
