"""Batches of pre-activations for tests of selection, the backends under test, and what their results must be."""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sae_train.kernels import Matches, selection_cpu, selection_gpu
from sae_train.ranks.interface import Solo
from tools import slow_selection

BACKENDS = pytest.mark.parametrize(
    "backend", [selection_cpu, selection_gpu, slow_selection], ids=["cpu", "gpu", "slow"]
)
KINDS = ["normal", "ties", "few", "none", "equal", "wide", "nan"]


def drawn_batch(kind: str, n: int, f: int, *, seed: int, dtype: torch.dtype) -> Tensor:
    """Pre-activations with ties, zeros, negatives, infinities and NaN; sometimes nothing positive at all."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(n, f, generator=generator)
    if kind in ("ties", "nan"):
        pre = (pre * 2).round()
    if kind == "few":
        pre = torch.where(torch.rand(n, f, generator=generator) < 0.1, pre, -pre.abs())
    elif kind == "none":
        pre = -pre.abs()
    elif kind == "equal":
        pre = torch.ones(n, f)
    elif kind == "wide":
        pre = pre * torch.exp2(60 * torch.rand(n, f, generator=generator) - 30)
        pre[torch.rand(n, f, generator=generator) < 0.02] = torch.inf
    elif kind == "nan":
        pre[torch.rand(n, f, generator=generator) < torch.rand((), generator=generator)] = torch.nan
    return pre.to(dtype)


@st.composite
def batches(draw: Any, *, max_tokens: int = 24, max_features: int = 40) -> Tensor:
    n, f = draw(st.integers(1, max_tokens)), draw(st.integers(1, max_features) | st.sampled_from([32, 64, 128]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return drawn_batch(draw(st.sampled_from(KINDS)), n, f, seed=draw(st.integers(0, 2**31)), dtype=dtype)


def alone(pre_NF: Tensor) -> dict[str, Any]:
    """What a process that is alone says of itself."""
    return {"n_features": pre_NF.shape[1], "ranks": Solo()}


def pairs(matches: Matches, *, first: tuple[int, int] = (0, 0)) -> set[tuple[int, int]]:
    """Return the (token, feature) pairs, counted from `first`."""
    used = int(matches.start[-1])
    token, feature = matches.token[:used] + first[0], matches.feature[:used] + first[1]
    return set(zip(token.tolist(), feature.tolist(), strict=True))


def check_layout(matches: Matches, pre_NF: Tensor, *, capacity: int) -> None:
    """Sorted by token, then feature; int32; the pre-activations at the matches; zeros in unused slots."""
    value, feature, token, start = matches
    used = int(start[-1])
    assert len(value) == len(feature) == len(token) == capacity
    assert feature.dtype == token.dtype == start.dtype == torch.int32
    assert value.dtype == pre_NF.dtype
    flat = token[:used].long() * pre_NF.shape[1] + feature[:used].long()
    assert bool((flat.diff() > 0).all())
    assert torch.equal(value[:used], pre_NF.flatten()[flat])
    assert not value[used:].any()
    assert not feature[used:].any()
    assert not token[used:].any()
    counts = torch.bincount(token[:used].long(), minlength=len(pre_NF))
    assert torch.equal(start.diff().long(), counts)
    assert start[0] == 0
