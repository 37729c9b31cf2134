"""Selection against sorting: every backend keeps the same pairs (test_selection_grid.py: on several ranks too)."""

from types import ModuleType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_train import kernels
from sae_train.kernels import Matches, radix, selection_cpu, selection_gpu
from sae_train.ranks.interface import Solo
from tools import slow_selection
from tools.selection_cases import BACKENDS, KINDS, alone, batches, check_layout, drawn_batch, pairs
from tools.small_runs import kept_by_sorting

SMALL = settings(deadline=None, max_examples=60)


@BACKENDS
@SMALL
@given(pre=batches(), share=st.floats(0, 1.2) | st.floats(0, 1 / 64), spare=st.integers(0, 5))
def test_batch_keeps_the_largest(backend: ModuleType, pre: Tensor, share: float, spare: int) -> None:
    assume(backend is not selection_gpu or not pre.isnan().any())  # below
    budget = max(1, round(share * pre.numel()))
    matches = backend.select_batch(pre, budget=budget, capacity=budget + spare, **alone(pre))
    check_layout(matches, pre, capacity=budget + spare)
    assert pairs(matches) == kept_by_sorting(pre, group="batch", budgets=[budget])
    assert int(matches.start[-1]) == min(budget, int((pre > 0).sum()))


@BACKENDS
@SMALL
@given(pre=batches(), k=st.integers(1, 45) | st.integers(1, 2))
def test_rows_keep_the_largest(backend: ModuleType, pre: Tensor, k: int) -> None:
    assume(backend is not selection_gpu or not pre.isnan().any())
    capacity = k * len(pre)
    matches = backend.select_rows(pre, k=k, capacity=capacity, **alone(pre))
    check_layout(matches, pre, capacity=capacity)
    assert pairs(matches) == kept_by_sorting(pre, group="row", budgets=[k] * len(pre))


@BACKENDS
@SMALL
@given(pre=batches(max_tokens=40, max_features=24), data=st.data())
def test_columns_keep_the_largest(backend: ModuleType, pre: Tensor, data: st.DataObject) -> None:
    budgets = data.draw(st.lists(st.integers(0, len(pre)), min_size=pre.shape[1], max_size=pre.shape[1]))
    assume(backend is not selection_gpu or not pre.isnan().any())
    capacity = sum(budgets) + 1
    matches = backend.select_columns(pre, budget_F=torch.tensor(budgets), capacity=capacity, ranks=Solo())
    check_layout(matches, pre, capacity=capacity)
    assert pairs(matches) == kept_by_sorting(pre, group="column", budgets=budgets)


@pytest.mark.parametrize("gathered", [1 << 24, 200], ids=["together", "a few at a time"])
@SMALL
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "nan"]),
    n=st.integers(1, 6).map(lambda groups: 64 * groups) | st.integers(1, 400),
    f=st.integers(1, 12),
    most=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_columns_of_many_groups(
    gathered: int, kind: str, n: int, f: int, most: int, seed: int, dtype: torch.dtype
) -> None:
    """So many tokens that groups of them are left out, in most columns; ties between groups and in them."""
    pre = drawn_batch(kind, n, f, seed=seed, dtype=dtype)
    budget_F = torch.randint(0, most + 1, (f,), generator=torch.Generator().manual_seed(seed))
    budget_F[::5] *= 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_gpu, "GATHERED", gathered)
        matches = selection_gpu.select_columns(pre, budget_F=budget_F, capacity=int(budget_F.sum()) + 1, ranks=Solo())
    check_layout(matches, pre, capacity=int(budget_F.sum()) + 1)
    assert pairs(matches) == kept_by_sorting(pre, group="column", budgets=budget_F.tolist())


def test_backends_agree_where_bounds_are_tight() -> None:
    """Sizes at which the candidate lists are short, unlike in the small cases above."""
    generator = torch.Generator().manual_seed(3)
    pre = torch.randn(519, 1037, generator=generator) - 0.5
    pre[7] *= 30  # one token that takes much of the batch's budget
    budget_F = torch.randint(0, 40, (1037,), generator=generator)
    budget_F[::50] = 260
    whole = torch.randn(519, 1088, generator=generator).mul(16).round()  # rows of lines and groups, ties at every cut
    tall = torch.randn(1024, 1037, generator=generator).mul(16).round()
    for name, arguments in (
        ("select_batch", {"pre_NF": pre, "budget": 4150, "capacity": 4150, **alone(pre)}),
        ("select_batch", {"pre_NF": whole, "budget": 4150, "capacity": 4150, **alone(whole)}),
        ("select_rows", {"pre_NF": pre, "k": 8, "capacity": 8 * 519, **alone(pre)}),
        ("select_rows", {"pre_NF": whole, "k": 8, "capacity": 8 * 519, **alone(whole)}),
        ("select_columns", {"pre_NF": pre, "budget_F": budget_F, "capacity": int(budget_F.sum()), "ranks": Solo()}),
        ("select_columns", {"pre_NF": tall, "budget_F": budget_F, "capacity": int(budget_F.sum()), "ranks": Solo()}),
    ):
        slow = getattr(slow_selection, name)(**arguments)
        for backend in (selection_cpu, selection_gpu):
            for fast, expected in zip(getattr(backend, name)(**arguments), slow, strict=True):
                assert torch.equal(fast, expected), (name, backend)


@BACKENDS
@pytest.mark.parametrize("width", [7, 128])
def test_no_tokens_no_matches(backend: ModuleType, width: int) -> None:
    pre = torch.zeros(0, width)
    for matches in (
        backend.select_batch(pre, budget=0, capacity=3, **alone(pre)),
        backend.select_batch(pre, budget=2, capacity=3, **alone(pre)),
        backend.select_rows(pre, k=1, capacity=3, **alone(pre)),
    ):
        check_layout(matches, pre, capacity=3)
        assert pairs(matches) == set()


def test_slow_selection_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pre = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).mul(2).round()

    def all_three() -> list[Matches]:
        return [
            slow_selection.select_batch(pre, budget=100, capacity=100, **alone(pre)),
            slow_selection.select_rows(pre, k=4, capacity=120, **alone(pre)),
            slow_selection.select_columns(pre, budget_F=torch.arange(20), capacity=190, ranks=Solo()),
        ]

    whole = all_three()
    monkeypatch.setattr(slow_selection, "CHUNK_ELEMENTS", 90)
    for one, other in zip(whole, all_three(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_candidate_lists_are_short() -> None:
    """The bound is worth its pass: little more than the budget reaches it."""
    pre = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    budget = 512 * 16
    maxima = selection_cpu._maxima(pre)
    bound = radix.kth_largest(selection_cpu._coarser(maxima, budget / pre.numel()), budget, Solo())
    assert budget <= len(selection_cpu._reaching(pre, maxima, bound)[0]) < 1.5 * budget


@BACKENDS
@pytest.mark.parametrize("rate", [1e-3, 0.5, 1.0])
def test_nan_is_not_positive(backend: ModuleType, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(64, 96, generator=generator)
    pre[torch.rand(64, 96, generator=generator) < rate] = torch.nan
    batch = backend.select_batch(pre, budget=300, capacity=300, **alone(pre))
    rows = backend.select_rows(pre, k=5, capacity=320, **alone(pre))
    columns = backend.select_columns(pre, budget_F=torch.full((96,), 3), capacity=288, ranks=Solo())
    if backend is selection_gpu:  # leaves out a NaN's neighbours, too
        for matches in (batch, rows, columns):
            assert pairs(matches) <= kept_by_sorting(pre, group="batch", budgets=[pre.numel()])
        return
    assert pairs(batch) == kept_by_sorting(pre, group="batch", budgets=[300])
    assert pairs(rows) == kept_by_sorting(pre, group="row", budgets=[5] * 64)
    assert pairs(columns) == kept_by_sorting(pre, group="column", budgets=[3] * 96)


@BACKENDS
@SMALL
@given(pre=batches(), k=st.integers(1, 30), seed=st.integers(0, 99))
def test_rows_among_allowed_columns(backend: ModuleType, pre: Tensor, k: int, seed: int) -> None:
    assume(backend is not selection_gpu or not pre.isnan().any())
    allowed = torch.rand(pre.shape[1], generator=torch.Generator().manual_seed(seed)) < 0.4
    matches = backend.select_rows(pre, k=k, capacity=k * len(pre), allowed_F=allowed, **alone(pre))
    check_layout(matches, pre, capacity=k * len(pre))
    masked = torch.where(allowed, pre, 0)
    assert pairs(matches) == kept_by_sorting(masked, group="row", budgets=[k] * len(pre))


def test_a_budget_of_none_keeps_none() -> None:
    pre = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    for given_NF in (pre, kernels.approximate(pre, torch.eye(20), torch.zeros(20))):
        kept = [
            kernels.select_batch(given_NF, budget=0, capacity=3, **alone(pre)),
            kernels.select_rows(given_NF, k=0, capacity=3, **alone(pre)),
            kernels.select_columns(given_NF, budget_F=torch.zeros(20, dtype=torch.int64), capacity=3, ranks=Solo()),
        ]
        for matches in kept:
            check_layout(matches, pre, capacity=3)
            assert pairs(matches) == set()


@pytest.mark.parametrize("first", range(3))
def test_flags_may_be_a_part_of_a_matrix(first: int) -> None:
    """Rows of 5 flags begin where no word of 8 does."""
    pre = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    flags = (pre > 0)[first:]
    assert pairs(kernels.select_where(pre[first:], flags)) == {(t, f) for t, f in flags.nonzero().tolist()}


@SMALL
@given(pre=batches(), level=st.sampled_from([0.0, 0.5, 1.0]))
def test_above_is_strict(pre: Tensor, level: float) -> None:
    threshold = torch.full((pre.shape[1],), level, dtype=pre.dtype)
    threshold[::3] = torch.inf
    matches = kernels.select_where(pre, pre > threshold)
    assert pairs(matches) == {(t, f) for t, f in (pre > threshold).nonzero().tolist()}
    check_layout(matches, pre, capacity=len(matches.value))


@SMALL
@given(pre=batches(), k=st.integers(1, 400))
def test_kth_largest_positive(pre: Tensor, k: int) -> None:
    values = sorted([v for v in pre.flatten().tolist() if v > 0], reverse=True)
    assert float(radix.kth_largest(pre, k, Solo())) == (values[k - 1] if k <= len(values) else 0.0)


@SMALL
@given(flags=st.lists(st.booleans(), min_size=1, max_size=70))
def test_flat_nonzero(flags: list[bool]) -> None:
    flag = torch.tensor(flags)
    assert torch.equal(selection_cpu.flat_nonzero(flag), flag.nonzero().squeeze(1))
