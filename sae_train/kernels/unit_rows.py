"""The optimizer's update: Adam, and the same on rows that stay at unit norm (projection, Adam, renormalisation).

torch is the reference and the CPU path. On a GPU a Triton kernel makes the update of unit rows in one pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from sae_train.kernels.backend import uses_triton

CHUNK_ELEMENTS = 1 << 17
"""Numbers of a matrix that stay in a CPU's cache from one operation to the next."""


@torch.no_grad()
def along_rows(gradient_FD: Tensor, weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Return each gradient's component along its unit row [F], and the squared norm of the rest of it [F].

    The sum of the second is the squared norm of the projected gradient.

    >>> along_rows(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
    (tensor([3.]), tensor([16.]))
    """
    if _moves_by_triton(weight_FD):
        from sae_train.kernels import triton_adam

        return triton_adam.along_rows(gradient_FD, weight_FD)
    size = max(1, CHUNK_ELEMENTS // max(1, weight_FD.shape[1])) if weight_FD.device.type == "cpu" else len(weight_FD)
    parts = []
    for gradient, weight in zip(gradient_FD.split(size), weight_FD.split(size), strict=True):
        along = (gradient * weight).sum(1)
        rest = torch.addcmul(gradient, weight, along.unsqueeze(1), value=-1)
        parts.append((along, torch.linalg.vector_norm(rest, dim=1).square_()))
    return torch.cat([along for along, _ in parts]), torch.cat([square for _, square in parts])


@torch.no_grad()
def move_unit_rows(
    weight_FD: Tensor, gradient_FD: Tensor, along_F: Tensor, mean_FD: Tensor, square_FD: Tensor, *, step: Tensor,
    scale: Tensor | None, halted: Tensor, lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Project the gradient, update unit rows and their moments [F, D] by Adam in place, renormalise the rows.

    >>> weight, gradient, step = torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 2.0]]), torch.tensor(0.0)
    >>> along, _ = along_rows(gradient, weight)
    >>> moments = torch.zeros(1, 2), torch.zeros(1, 2)
    >>> rates = {"lr": 1.0, "beta1": 0.9, "beta2": 0.999, "eps": 0.0001}
    >>> move_unit_rows(weight, gradient, along, *moments, step=step, scale=None, halted=torch.tensor(False), **rates)
    >>> weight  # from (1, 0) by a step of 1 to (1, -1), and back to unit norm
    tensor([[ 0.7071, -0.7071]])

    Args:
        weight_FD: rows of unit norm; a row of zeros stays.
        gradient_FD: may be written to.
        along_F: of `along_rows`; this much of each row is taken off its gradient.
        mean_FD: first moment, square_FD the second.
        step: count of the steps before this one, a scalar on the device; counted on unless halted.
        scale: divisor of the gradients, a scalar on the device; 1 if None.
        halted: scalar bool on the device; where it is true nothing changes, to the bit.
        lr: learning rate; beta1, beta2 and eps as in the paper.
    """
    settings: Any = {"scale": scale, "halted": halted, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
    if _moves_by_triton(weight_FD):
        from sae_train.kernels import triton_adam

        triton_adam.move(weight_FD, gradient_FD, along_F, mean_FD, square_FD, step=step + 1, **settings)
        step.add_(1 - halted.to(step.dtype))
        return
    gradient_FD.addcmul_(weight_FD, along_F.unsqueeze(1), value=-1)
    adam([weight_FD], [gradient_FD], [mean_FD], [square_FD], [step], **settings)
    norm_F1 = torch.linalg.vector_norm(weight_FD, dim=1, keepdim=True)
    weight_FD.div_(torch.where((norm_F1 > 0) & ~halted, norm_F1, 1))


@torch.no_grad()
def adam(
    weights: list[Tensor], gradients: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: list[Tensor], *,
    scale: Tensor | None, halted: Tensor, lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Update tensors and their moments in place by torch's fused Adam; `move_unit_rows` has the arguments.

    It is the documented function behind `torch.optim.Adam(fused=True)`. The class itself imports torch's compiler,
    which takes more than a second.

    >>> weight, moments, step = torch.zeros(2), (torch.zeros(2), torch.zeros(2)), torch.tensor(0.0)
    >>> rates = {"lr": 0.5, "beta1": 0.9, "beta2": 0.999, "eps": 0.0}
    >>> given = [weight], [torch.tensor([3.0, -7.0])], [moments[0]], [moments[1]], [step]
    >>> adam(*given, scale=None, halted=torch.tensor(False), **rates)
    >>> weight.round(decimals=3), step
    (tensor([-0.5000,  0.5000]), tensor(1.))
    """
    if scale is not None and gradients[0].dtype == torch.float64:  # the fused pass reads a float32 scale
        for gradient in gradients:
            gradient.div_(scale)
        scale = None
    torch_adam(
        weights, gradients, means, squares, [], steps, fused=True, foreach=False, capturable=False,
        differentiable=False, grad_scale=None if scale is None else scale.float(), found_inf=halted.float(),
        amsgrad=False, maximize=False, weight_decay=0.0, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
    )  # fmt: skip
    torch.autograd.graph.increment_version(weights)  # which torch's fused pass leaves out


def _moves_by_triton(weight_FD: Tensor) -> bool:
    """Return whether Triton moves these rows; its divisions and roots are those of fp32."""
    return uses_triton(weight_FD.device) and weight_FD.dtype == torch.float32
