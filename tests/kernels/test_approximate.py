"""Approximate pre-activations: a bf16 product finds candidates, and what is kept of them is cut by exact values."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_train import kernels
from sae_train.kernels import Approximate, Matches, selection_cpu, selection_gpu
from sae_train.kernels.approximate_product import more_than
from sae_train.ranks.interface import Ranks, Solo
from tools.grid_of_threads import on_grid
from tools.selection_cases import pairs
from tools.small_runs import kept_by_sorting

SMALL = settings(deadline=None, max_examples=40)
ROOMS = pytest.mark.parametrize("room", [selection_cpu, selection_gpu], ids=["cpu", "gpu"])


def factors(n: int, d: int, f: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((n, d), (f, d), (f,)))
    return x / d**0.5, W, b - 0.5


def selections(pre: Tensor | Approximate, *, k: int, ranks: Ranks, n_features: int) -> dict[str, Matches]:
    n, width = pre.shape
    budget_F = (torch.arange(width) % 4).clamp(max=n * ranks.data.size)
    where: dict[str, Any] = {"n_features": n_features, "ranks": ranks}
    budget = k * n * ranks.data.size
    return {
        "batch": kernels.select_batch(pre, budget=budget, capacity=budget, **where),
        "row": kernels.select_rows(pre, k=k, capacity=n * min(k, width), **where),
        "column": kernels.select_columns(pre, budget_F=budget_F, capacity=int(budget_F.sum()), ranks=ranks),
    }


@ROOMS
@SMALL
@given(n=st.integers(1, 20), d=st.integers(1, 8), f=st.integers(4, 40), k=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_values_are_those_of_fp32_and_the_cut_is_over_them(
    room: Any, n: int, d: int, f: int, k: int, seed: int
) -> None:
    """Of the candidates exactly the largest positive ones are kept, of the dense fp32 product."""
    x, W, b = factors(n, d, f, seed=seed)
    near, exact = kernels.approximate(x, W, b), x @ W.t() + b
    budget_F, where = torch.arange(f) % 4, {"n_features": f, "ranks": Solo()}
    budget_F = budget_F.clamp(max=n)
    more, row = more_than(k * n), min(more_than(k), f)
    more_F = torch.tensor([more_than(each) for each in budget_F.tolist()])
    wide = {
        "batch": room.select_batch(near.bf16_NF, budget=more, capacity=more, **where),
        "row": room.select_rows(near.bf16_NF, k=row, capacity=row * n, **where),
        "column": room.select_columns(near.bf16_NF, budget_F=more_F, capacity=int(more_F.sum()), ranks=Solo()),
    }
    budgets = {"batch": [k * n], "row": [k] * n, "column": budget_F.tolist()}
    for group, matches in selections(near, k=k, ranks=Solo(), n_features=f).items():
        found = pairs(matches)
        assert found <= pairs(wide[group]), "candidates of the approximate product"
        used = int(matches.start[-1])
        place = matches.token[:used].long(), matches.feature[:used].long()
        torch.testing.assert_close(matches.value[:used], exact[place], rtol=1e-5, atol=1e-5)
        assert bool((matches.value[:used] > 0).all())
        values = torch.zeros(n, f)
        index, value = near.exact(wide[group])
        is_there = index < n * f
        values.view(-1)[index[is_there]] = value[is_there]
        assert found == kept_by_sorting(values, group=group, budgets=budgets[group])


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 2), (2, 3)], ids=str)
def test_any_grid_keeps_the_same_pairs_where_the_approximate_ones_are_equal(grid: tuple[int, int]) -> None:
    """Factors are whole numbers here, so that the order of sums changes nothing."""
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((12, 6), (30, 6)))
    b = torch.randint(-1, 2, (30,), generator=generator).float()
    alone = {
        group: pairs(found)
        for group, found in selections(kernels.approximate(x, W, b), k=2, ranks=Solo(), n_features=30).items()
    }

    def work(ranks: Ranks) -> dict[str, set[tuple[int, int]]]:
        (top, bottom), (left, right) = ranks.data.slice(12), ranks.features.slice(30)
        near = kernels.approximate(x[top:bottom], W[left:right], b[left:right])
        budget_F = (torch.arange(30) % 4)[left:right]
        where: dict[str, Any] = {"n_features": 30, "ranks": ranks}
        found = {
            "batch": kernels.select_batch(near, budget=24, capacity=24, **where),
            "row": kernels.select_rows(near, k=2, capacity=2 * len(near.x_ND), **where),
            "column": kernels.select_columns(near, budget_F=budget_F, capacity=60, ranks=ranks),
        }
        return {group: pairs(matches, first=(top, left)) for group, matches in found.items()}

    for group, kept in alone.items():
        assert set().union(*(found[group] for found in on_grid(grid, work))) == kept


def test_little_is_missed() -> None:
    """Ten per cent more candidates than matches: of 4096 matches all but a few are those of the fp32 product."""
    x, W, b = factors(256, 64, 1024, seed=0)
    exact, near = x @ W.t() + b, kernels.approximate(x, W, b)
    for group, matches in selections(near, k=16, ranks=Solo(), n_features=1024).items():
        kept = pairs(matches)
        expected = pairs(selections(exact, k=16, ranks=Solo(), n_features=1024)[group])
        assert len(expected - kept) <= 0.002 * len(expected), group


def test_allowed_columns_of_approximate_ones() -> None:
    x, W, b = factors(30, 16, 64, seed=1)
    allowed = torch.arange(64) % 3 == 0
    found = kernels.select_rows(
        kernels.approximate(x, W, b), k=3, capacity=90, n_features=64, ranks=Solo(), allowed_F=allowed
    )
    assert bool(allowed[found.feature[: int(found.start[-1])].long()].all())
