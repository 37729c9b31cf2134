"""Small problems of the sparse products: a batch, weights, and the matches that a budget keeps."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.ranks.interface import Solo


class Problem(NamedTuple):
    """A batch, weights, and what a budget keeps; one slot in four is unused."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    matches: kernels.Matches
    mask: Tensor

    @property
    def place(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.matches.feature, self.matches.token, self.matches.start


def problem(n: int, d: int, f: int, *, seed: int, dtype: torch.dtype = torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    x, W_enc, b_enc, W_dec = draw(n, d), draw(f, d), draw(f), draw(f, d)
    pre = kernels.affine(x, W_enc, b_enc, precision="float64" if dtype == torch.float64 else "float32")
    budget = max(1, n * f // 5)
    matches = kernels.select_batch(
        pre, budget=budget, capacity=budget + budget // 3 + 1, n_features=pre.shape[1], ranks=Solo()
    )
    used = int(matches.start[-1])
    mask = torch.zeros(n, f, dtype=torch.bool)
    mask[matches.token[:used].long(), matches.feature[:used].long()] = True
    return Problem(x, W_enc.requires_grad_(), b_enc.requires_grad_(), W_dec.requires_grad_(), matches, mask)


def sparse_reconstruction(p: Problem, precision: str = "float32") -> tuple[Tensor, Tensor]:
    value = kernels.attach(p.matches.value, p.x, p.W_enc, p.b_enc, *p.place, precision=precision)
    return value, kernels.decode(value, p.W_dec, *p.place, precision=precision)


def gradients(loss: Tensor, p: Problem) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (p.W_enc, p.b_enc, p.W_dec))


def with_rounded_rows(p: Problem) -> list[tuple[Tensor, Tensor]]:
    """Return products of an fp32 problem in bf16, each with the float64 sum over rows that are rounded to bf16.

    They are the reconstruction, and the gradients of its square and of the cubes of the values.
    """
    value, rows = sparse_reconstruction(p, "bf16")
    found = [rows, *gradients(rows.square().sum() + (value**3).sum(), p)]
    code = torch.zeros(p.mask.shape, dtype=torch.float64, device=rows.device)
    used = int(p.matches.start[-1])
    code[p.matches.token[:used].long(), p.matches.feature[:used].long()] = p.matches.value[:used].double()
    x, W_dec = p.x.bfloat16().double(), p.W_dec.detach().bfloat16().double()
    upstream = (2 * rows.detach()).bfloat16().double()
    slopes = torch.where(p.mask.to(rows.device), upstream @ W_dec.t() + 3 * code**2, 0)
    expected = [code @ W_dec, slopes.t() @ x, slopes.sum(0), code.t() @ upstream]
    return list(zip([each.detach() for each in found], expected, strict=True))
