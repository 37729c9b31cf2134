"""The compiled cut among candidates, what is kept of them, and bounds of columns, against slow oracles."""

import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numba import njit
from test_numba import NUMBERS, SMALL, THREADS, plain
from torch import Tensor

from sae_train.kernels import matches, numba_adam, numba_cut, numba_leading, numba_rows, numba_team
from tools.small_runs import torch_threads

candidates = sys.modules["sae_train.kernels.candidates"]
FEW = st.sampled_from([0.25, 1.0, 1.0 + 2.0**-20, 1.0 + 2.0**-23, 2.0])


@SMALL
@given(values=st.lists(FEW | NUMBERS, max_size=60), k=st.integers(1, 70), n_threads=THREADS)
@example(values=[float("nan"), 1.0], k=1, n_threads=2)
def test_kth_largest(values: list[float], k: int, n_threads: int) -> None:
    given = torch.tensor(values)
    positive = sorted((value for value in given.tolist() if value > 0), reverse=True)
    with torch_threads(n_threads):
        found = float(numba_cut.kth_largest(given, k))
    assert found == (positive[k - 1] if k <= len(positive) else 0)


def test_kth_largest_of_many_in_one_bin() -> None:
    """Whose order is that of their low bits alone."""
    values = (torch.arange(50_000, dtype=torch.int32) * 7919 % 50_000 + 0x3F800000).view(torch.float32)
    assert float(numba_cut.kth_largest(values, 12_345)) == float(values.sort(descending=True).values[12_344])


@st.composite
def entries(draw: Any) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Ascending flat indices of a grid, values, which are to be kept, and the grid's shape."""
    n, f = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    index = torch.tensor(sorted(draw(st.sets(st.integers(0, n * f - 1)))), dtype=torch.int64)
    value = torch.tensor([draw(NUMBERS) for _ in index])
    return index, value, torch.tensor([draw(st.booleans()) for _ in index], dtype=torch.bool), (n, f)


@SMALL
@given(case=entries(), n_threads=THREADS, spare=st.integers(0, 3), keeps_all=st.booleans())
def test_what_is_kept_and_packed(
    case: tuple[Tensor, Tensor, Tensor, tuple[int, int]], n_threads: int, spare: int, keeps_all: bool
) -> None:
    index, value, keep, (n, f) = case
    pairs = [(int(i), v) for i, v, wanted in zip(index, value.tolist(), keep, strict=True) if wanted or keeps_all]
    with torch_threads(n_threads):
        kept_index, kept_value = matches.kept(index, value, keep)
        packed = matches.pack(index, value, None if keeps_all else keep, shape=(n, f), capacity=len(pairs) + spare)
    if not keeps_all:
        assert kept_index.tolist() == [i for i, _ in pairs]
        assert kept_value.tolist() == pytest.approx([v for _, v in pairs], nan_ok=True, abs=0, rel=0)
    zeros = [0] * spare
    assert packed.value.tolist() == pytest.approx([v for _, v in pairs] + zeros, nan_ok=True, abs=0, rel=0)
    assert packed.feature.tolist() == [i % f for i, _ in pairs] + zeros
    assert packed.token.tolist() == [i // f for i, _ in pairs] + zeros
    assert packed.start.tolist() == [sum(i // f < token for i, _ in pairs) for token in range(n + 1)]
    with plain():
        slow = matches.pack(index, value, None if keeps_all else keep, shape=(n, f), capacity=len(pairs) + spare)
    for one, other in zip(packed, slow, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(nan=5.0), other.nan_to_num(nan=5.0))


def test_more_than_there_are_slots_for() -> None:
    with pytest.raises(ValueError, match="3 matches do not fit into 2 slots"):
        matches.pack(torch.arange(3), torch.ones(3), None, shape=(1, 3), capacity=2)


@SMALL
@given(case=entries(), n_threads=THREADS, is_per_feature=st.booleans(), data=st.data())
def test_entries_that_reach_the_bound_of_their_row_or_column(
    case: tuple[Tensor, Tensor, Tensor, tuple[int, int]], n_threads: int, is_per_feature: bool, data: st.DataObject
) -> None:
    index, value, _, (n, f) = case
    shape = (1, f) if is_per_feature else (n, 1)
    bound = torch.tensor([data.draw(NUMBERS) for _ in range(max(shape))]).reshape(shape)
    with torch_threads(n_threads):
        found = numba_cut.reaching(index, value, bound, n_features=f)
    assert found.tolist() == (value >= bound.expand(n, f).reshape(-1)[index]).tolist()


def test_the_bound_of_a_single_row_is_not_taken_for_its_first_columns() -> None:
    bound = torch.tensor([0.5, 5.0, 5.0])[:1].view(1, 1)
    assert numba_cut.reaching(torch.arange(3), torch.ones(3), bound, n_features=3).tolist() == [True] * 3


@SMALL
@given(
    n_groups=st.integers(1, 70),
    n_features=st.integers(1, 70),
    few=st.lists(NUMBERS, min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    n_threads=THREADS,
)
def test_kth_of_columns(n_groups: int, n_features: int, few: list[float], seed: int, n_threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_groups, n_features, generator=generator)
    chosen = torch.tensor(few)[torch.randint(len(few), drawn.shape, generator=generator)]
    maxima = torch.where(torch.rand(drawn.shape, generator=generator) < 0.5, drawn, chosen).bfloat16()
    bits = maxima.view(torch.int16)
    bits = torch.where(maxima.isnan() & (drawn > 0), bits & 0x7FFF, bits)  # NaN of either sign
    k_F = torch.randint(n_groups + 3, (n_features,), generator=generator)
    with torch_threads(n_threads):
        found = numba_leading.kth_of_columns(bits, k_F).view(torch.bfloat16)
    for column, k, bound in zip(maxima.t(), k_F.tolist(), found.tolist(), strict=True):
        positive = sorted((value for value in column.tolist() if value > 0), reverse=True)
        assert bound == (float("inf") if k == 0 else positive[k - 1] if k <= len(positive) else 0)


@SMALL
@given(values=st.lists(NUMBERS, min_size=1, max_size=80), n=st.integers(1, 5), n_threads=THREADS)
def test_rows_in_bf16(values: list[float], n: int, n_threads: int) -> None:
    rows = torch.tensor(values).repeat(n, 1)
    with torch_threads(n_threads):
        found = numba_rows.bf16(rows)
    assert torch.equal(found.isnan(), rows.isnan())
    is_number = ~rows.isnan()
    assert torch.equal(found[is_number].view(torch.int16), rows.bfloat16()[is_number].view(torch.int16))


@SMALL
@given(n=st.integers(1, 9), d=st.integers(1, 70), seed=st.integers(0, 10**6), n_threads=THREADS)
def test_squares_of_rows(n: int, d: int, seed: int, n_threads: int) -> None:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    with torch_threads(n_threads):
        found = numba_adam.squares(rows)
    torch.testing.assert_close(found.double(), rows.double().square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("is_wide", [True, False])
def test_vectors_of_512_bits_are_asked_for_where_they_are_faster(
    is_wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba_team, "_IS_WIDE", is_wide)

    @njit(fastmath=numba_team.SUMS)
    def total(a_D: Any) -> Any:
        numba_team.wide()
        found = numba.float32(0)
        for d in range(len(a_D)):
            found += a_D[d]
        return found

    assert total(np.arange(100, dtype=np.float32)) == 4950
    (llvm,) = total.inspect_llvm().values()
    assert ('"prefer-vector-width"="512"' in llvm) == is_wide


def test_this_processor_is_known_for_what_it_is() -> None:
    has_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else False
    assert has_amx == numba_team._IS_WIDE
