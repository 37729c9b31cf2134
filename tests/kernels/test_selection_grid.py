"""Selection on grids of ranks, which are threads here: every grid and backend keeps the pairs that sorting keeps."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_train import kernels
from sae_train.kernels import Matches, radix, selection_cpu, selection_gpu
from sae_train.ranks.interface import Ranks, Solo
from tools import slow_selection
from tools.grid_of_threads import on_grid, shard
from tools.selection_cases import BACKENDS, KINDS, check_layout, drawn_batch, pairs
from tools.small_runs import kept_by_sorting

GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 3), (3, 1), (2, 3)]
SMALL = settings(deadline=None, max_examples=60)


def union_on(grid: tuple[int, int], whole_NF: Tensor, select: Callable[..., tuple[Matches, int]]) -> set[Any]:
    """Return the pairs that all ranks keep together, each in a sound layout."""

    def work(ranks: Ranks) -> set[tuple[int, int]]:
        own, first = shard(whole_NF, ranks)
        matches, capacity = select(own, first, ranks)
        check_layout(matches, own, capacity=capacity)
        return pairs(matches, first=first)

    kept = on_grid(grid, work)
    assert sum(len(part) for part in kept) == len(set().union(*kept))
    return set().union(*kept)


@st.composite
def grids(draw: Any) -> tuple[tuple[int, int], Tensor]:
    """A grid, and a batch whose tokens its rows share evenly and whose features its columns share as they can."""
    grid = draw(st.sampled_from(GRIDS))
    n, f = grid[0] * draw(st.integers(1, 9)), draw(st.integers(grid[1], 26))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return grid, drawn_batch(draw(st.sampled_from(KINDS)), n, f, seed=draw(st.integers(0, 2**31)), dtype=dtype)


@BACKENDS
@SMALL
@given(drawn=grids(), share=st.floats(0, 1.2))
def test_batch(backend: ModuleType, drawn: tuple[tuple[int, int], Tensor], share: float) -> None:
    grid, whole = drawn
    assume(backend is not selection_gpu or not whole.isnan().any())  # which counts the whole group as empty
    budget = round(share * int((whole > 0).sum()))

    def select(own: Tensor, first: tuple[int, int], ranks: Ranks) -> tuple[Matches, int]:
        return backend.select_batch(
            own, budget=budget, capacity=budget + 2, n_features=whole.shape[1], ranks=ranks
        ), budget + 2

    kept = union_on(grid, whole, select)
    assert kept == kept_by_sorting(whole, group="batch", budgets=[budget])
    assert len(kept) == min(budget, int((whole > 0).sum()))


@BACKENDS
@SMALL
@given(drawn=grids(), k=st.integers(1, 30), allowed=st.one_of(st.none(), st.floats(0, 1)))
def test_rows(backend: ModuleType, drawn: tuple[tuple[int, int], Tensor], k: int, allowed: float | None) -> None:
    grid, whole = drawn
    assume(backend is not selection_gpu or not whole.isnan().any())
    allowed_F = None
    if allowed is not None:
        allowed_F = torch.rand(whole.shape[1], generator=torch.Generator().manual_seed(len(whole))) < allowed

    def select(own: Tensor, first: tuple[int, int], ranks: Ranks) -> tuple[Matches, int]:
        mask = None if allowed_F is None else allowed_F[first[1] : first[1] + own.shape[1]]
        capacity = len(own) * min(k, own.shape[1]) + 1
        return backend.select_rows(
            own, k=k, capacity=capacity, n_features=whole.shape[1], ranks=ranks, allowed_F=mask
        ), capacity

    masked = whole if allowed_F is None else torch.where(allowed_F, whole, 0)
    assert union_on(grid, whole, select) == kept_by_sorting(masked, group="row", budgets=[k] * len(whole))


@BACKENDS
@SMALL
@given(drawn=grids(), data=st.data())
def test_columns(backend: ModuleType, drawn: tuple[tuple[int, int], Tensor], data: st.DataObject) -> None:
    grid, whole = drawn
    assume(backend is not selection_gpu or not whole.isnan().any())
    most = data.draw(st.integers(0, len(whole) + 2))
    budgets = data.draw(st.lists(st.integers(0, most), min_size=whole.shape[1], max_size=whole.shape[1]))

    def select(own: Tensor, first: tuple[int, int], ranks: Ranks) -> tuple[Matches, int]:
        budget_F = torch.tensor(budgets[first[1] : first[1] + own.shape[1]], dtype=torch.int64)
        capacity = sum(budgets) + 1
        return backend.select_columns(own, budget_F=budget_F, capacity=capacity, ranks=ranks), capacity

    assert union_on(grid, whole, select) == kept_by_sorting(whole, group="column", budgets=budgets)


@SMALL
@given(drawn=grids(), k=st.integers(1, 300))
def test_kth_largest(drawn: tuple[tuple[int, int], Tensor], k: int) -> None:
    grid, whole = drawn
    values = sorted([v for v in whole.flatten().tolist() if v > 0], reverse=True)
    expected = values[k - 1] if k <= len(values) else 0.0
    found = on_grid(grid, lambda ranks: float(radix.kth_largest(shard(whole, ranks)[0], k, ranks)))
    assert found == [expected] * (grid[0] * grid[1])


@BACKENDS
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("value", [1.0, torch.inf])
def test_ties_go_to_the_lower_token_then_feature(backend: ModuleType, grid: tuple[int, int], value: float) -> None:
    whole = torch.full((12, 89), value)  # flat indices of one whole digit
    order = [(token, feature) for token in range(12) for feature in range(89)]

    for budget in (0, 1, 50, 88, 89, 90, 400, 534, 535, 1067, 1068, 1100):

        def select(own: Tensor, first: tuple[int, int], ranks: Ranks, budget: int = budget) -> tuple[Matches, int]:
            return backend.select_batch(own, budget=budget, capacity=budget, n_features=89, ranks=ranks), budget

        assert union_on(grid, whole, select) == set(order[:budget])


@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_backends_agree_where_lists_are_short(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """Sizes at which bounds are tight, with ties at every cut."""
    whole = drawn_batch("normal", 384, 1031, seed=1, dtype=dtype).mul(16).round()
    budget_F = torch.randint(0, 40, (1031,), generator=torch.Generator().manual_seed(0))
    wide = {"n_features": 1031}

    def work(ranks: Ranks) -> None:
        own, (_, left) = shard(whole, ranks)
        own_F = budget_F[left : left + own.shape[1]]
        for name, arguments in (
            ("select_batch", {"budget": 2471, "capacity": 2471, **wide}),
            ("select_rows", {"k": 8, "capacity": 8 * len(own), **wide}),
            ("select_columns", {"budget_F": own_F, "capacity": int(budget_F.sum())}),
        ):
            slow = getattr(slow_selection, name)(own, **arguments, ranks=ranks)
            for backend in (selection_cpu, selection_gpu):
                for one, other in zip(getattr(backend, name)(own, **arguments, ranks=ranks), slow, strict=True):
                    assert torch.equal(one, other), (name, backend)

    on_grid(grid, work)


def traffic_of(grid: tuple[int, int], whole_NF: Tensor, select: Callable[[Tensor, Ranks], object]) -> list[int]:
    """Return the bytes that each rank moves for one selection."""

    def work(ranks: Ranks) -> int:
        select(shard(whole_NF, ranks)[0], ranks)
        return ranks.traffic.total()

    return on_grid(grid, work)


@BACKENDS
@pytest.mark.parametrize("grid", [(2, 1), (1, 2), (2, 2), (1, 3)], ids=str)
def test_traffic_does_not_grow_with_the_batch(backend: ModuleType, grid: tuple[int, int]) -> None:
    n_ranks, n_columns, k = grid[0] * grid[1], grid[1], 4
    of_batch, of_rows = {}, {}
    for n, f in ((48, 60), (48, 1920), (192, 1920)):
        whole = drawn_batch("normal", n, f, seed=0, dtype=torch.float32).round()

        def batch(own: Tensor, ranks: Ranks, f: int = f, n: int = n) -> object:
            return backend.select_batch(own, budget=k * n, capacity=k * n, n_features=f, ranks=ranks)

        def rows(own: Tensor, ranks: Ranks, f: int = f) -> object:
            return backend.select_rows(own, k=k, capacity=k * len(own), n_features=f, ranks=ranks)

        of_batch[n, f] = traffic_of(grid, whole, batch)
        of_rows[n, f] = traffic_of(grid, whole, rows)
    histogram = 8 << radix.DIGIT_BITS
    assert all(sum(bytes_R) <= n_ranks * (12 * 2 * histogram + 16 * n_ranks) for bytes_R in of_batch.values())
    if n_columns == 1:
        assert of_batch[48, 60] == of_batch[48, 1920] == of_batch[192, 1920]
    assert of_rows[48, 60] == of_rows[48, 1920]
    row = 48 // grid[0]
    assert max(of_rows[48, 1920]) == row * (n_columns - 1) * (k * 4 + 8) // n_columns


@BACKENDS
def test_columns_send_no_more_than_could_be_kept(backend: ModuleType) -> None:
    whole, budgets = drawn_batch("normal", 24, 30, seed=0, dtype=torch.float32), torch.arange(30)

    def columns(own: Tensor, ranks: Ranks) -> object:
        return backend.select_columns(own, budget_F=budgets, capacity=int(budgets.sum()), ranks=ranks)

    most = int(budgets.clamp(max=8).sum()) * 4 + 30 * 8 * 2
    assert max(traffic_of((3, 1), whole, columns)) <= most
    assert traffic_of((1, 1), whole, columns) == [0]


def test_a_column_of_ranks_speaks_only_when_rows_are_spread() -> None:
    whole = drawn_batch("ties", 24, 30, seed=0, dtype=torch.float32)
    assert traffic_of(
        (2, 1), whole, lambda own, ranks: kernels.select_rows(own, k=3, capacity=36, n_features=30, ranks=ranks)
    ) == [0, 0]
    assert traffic_of(
        (1, 2),
        whole,
        lambda own, ranks: kernels.select_columns(own, budget_F=torch.full((15,), 4), capacity=60, ranks=ranks),
    ) == [0, 0]


class Lonely(Solo):
    """A rank of a 2 x 2 grid whose tensors have shapes and no values: only what collectives return is known."""

    def __init__(self, *, size: int = 4, parts: bool = True) -> None:
        super().__init__("meta")
        self.size = size
        if parts:
            self.data, self.features = Lonely(size=2, parts=False), Lonely(size=2, parts=False)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor.expand(self.size, *tensor.shape).clone()

    def exchange(self, rows: Tensor, *, send: list[int], receive: list[int]) -> Tensor:
        assert len(rows) == sum(send)
        return rows.new_empty((sum(receive), *rows.shape[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("ranks", [Solo("meta"), Lonely()], ids=["alone", "grid"])
def test_nothing_is_read_from_a_device(ranks: Ranks, dtype: torch.dtype) -> None:
    """On tensors without values every read raises; host tensors stay real."""
    pre = torch.empty(128, 20, dtype=dtype, device="meta")
    mask = torch.empty(20, dtype=torch.bool, device="meta")
    n_features = 20 * ranks.features.size
    for matches in (
        kernels.select_batch(pre, budget=70, capacity=512, n_features=n_features, ranks=ranks),
        kernels.select_rows(pre, k=4, capacity=512, n_features=n_features, ranks=ranks, allowed_F=mask),
        kernels.select_rows(pre, k=4, capacity=512, n_features=n_features, ranks=ranks),
        kernels.select_columns(pre, budget_F=torch.arange(20), capacity=512, ranks=ranks),
    ):
        assert matches.value.shape == (512,)
        assert matches.value.device.type == "meta"
