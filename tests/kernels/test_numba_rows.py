"""Compiled passes over rows against plain torch and float64, on any number of threads."""

import copy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_numba import NUMBERS, SMALL, THREADS, plain
from torch import Tensor

from sae_train import kernels
from sae_train.kernels import numba_adam, numba_backward, numba_products, numba_rows
from sae_train.kernels.matches import by_feature
from tools.small_runs import torch_threads

screen = sys.modules["sae_train.kernels.screen"]
SIZES = {"n": st.integers(1, 9) | st.integers(250, 600), "d": st.integers(1, 70)}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@SMALL
@given(**SIZES, groups=st.integers(0, 3), seed=st.integers(0, 10**6), n_threads=THREADS)
def test_what_reconstructions_miss(n: int, d: int, groups: int, seed: int, n_threads: int) -> None:
    x, bias = drawn(n, d, seed=seed), drawn(d, seed=seed + 1)
    x_hat = drawn(*([groups] if groups else []), n, d, seed=seed + 2)
    results = []
    for on in (n_threads, 1):
        with torch_threads(on):
            scaled, total = kernels.scaled_and_sum(x_hat, torch.tensor(0.3))
            results.append([*kernels.missed(x, x_hat, bias), *kernels.missed(x, x_hat), scaled, total])
            results[-1] += kernels.norms_and_sum(x)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    with plain():
        exact = [each.double() for each in (x, x_hat, bias)]
        scaled, total = kernels.scaled_and_sum(exact[1], torch.tensor(0.3, dtype=torch.float32).double())
        expected = [*kernels.missed(*exact), *kernels.missed(*exact[:2]), scaled, total]
        expected += kernels.norms_and_sum(exact[0])
    for found, one in zip(results[0], expected, strict=True):
        assert found.shape == one.shape
        torch.testing.assert_close(found.double(), one, rtol=1e-5, atol=1e-4)


FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@SMALL
@given(
    parts=st.lists(st.integers(0, 120), min_size=1, max_size=7).filter(any), n=st.integers(0, 90),
    d=st.integers(1, 70) | st.sampled_from([384, 1000]),
    formats=st.lists(st.sampled_from(FORMATS), min_size=1, max_size=2),
    few=st.lists(NUMBERS, min_size=1, max_size=5), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 10**6),
    n_threads=THREADS,
)  # fmt: skip
def test_normalised_rows(
    parts: list[int], n: int, d: int, formats: list[torch.dtype], few: list[float], scale: float, seed: int,
    n_threads: int,
) -> None:  # fmt: skip
    """Those of plain torch to the bit, so that a run is the same with and without compiled kernels to feed it."""
    generator = torch.Generator().manual_seed(seed)
    raw, centre = drawn(sum(parts), d, seed=seed), drawn(d, seed=seed + 1)
    raw.view(-1)[torch.randint(raw.numel(), (3,), generator=generator)] = torch.tensor(few)[[0, -1, 0]]
    pieces = [part.to(formats[i % len(formats)]) for i, part in enumerate(raw.split(parts))]
    table = kernels.Table(pieces)
    turned = kernels.Table([part.t().contiguous().t() for part in pieces])
    index = torch.randint(len(raw), (n,), generator=generator)
    for like in (centre, centre.double()):
        rows = torch.cat([part.to(like.dtype) for part in pieces])[index]
        assert torch.equal(table.rows(index, dtype=like.dtype).nan_to_num(nan=7.0), rows.nan_to_num(nan=7.0))
        expected = (rows - like) / scale
        with torch_threads(n_threads):
            found = [each.normalised(index, like, scale) for each in (table, turned)]
        with plain():
            found.append(table.normalised(index, like, scale))
        for each in found:
            assert each.dtype == like.dtype
            assert torch.equal(each.isnan(), expected.isnan())
            assert torch.equal(each.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_a_copy_of_a_table_reads_its_own_parts() -> None:
    part, index = torch.ones(3, 5), torch.tensor([2, 0])
    table = kernels.Table([part])
    copied = copy.deepcopy(table)
    part.zero_()
    assert copied.normalised(index, torch.zeros(5), 1.0).unique().tolist() == [1.0]
    assert table.normalised(index, torch.zeros(5), 1.0).unique().tolist() == [0.0]


@SMALL
@given(
    n=st.integers(1, 9), f=st.integers(1, 90), few=st.lists(NUMBERS, min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.05]), seed=st.integers(0, 10**6), are_rounded=st.booleans(), n_threads=THREADS,
)  # fmt: skip
def test_bounds_of_screening(
    n: int, f: int, few: list[float], share: float, seed: int, are_rounded: bool, n_threads: int
) -> None:
    """Those of plain torch: NaN where it says so, else the same to a rounding."""

    def numbers(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        odd = torch.tensor(few)[torch.randint(len(few), (count,), generator=generator)]
        return torch.where(torch.rand(count, generator=generator) < share, odd, drawn(count, seed=seed))

    x, W = (
        screen.Rounded(torch.empty(0), numbers(size, seed + i).abs(), numbers(size, seed + i + 2).abs() * 2**-9)
        for i, size in enumerate((n, f))
    )
    b_F = numbers(f, seed + 4)
    with torch_threads(n_threads):
        found = screen._errors(x, W, b_F, summands=71, are_rounded=are_rounded)
    with plain():
        expected = screen._errors(x, W, b_F, summands=71, are_rounded=are_rounded)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-45, equal_nan=True)


@SMALL
@given(
    n=st.integers(1, 20), d=st.integers(1, 70), f=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), n_threads=THREADS,
)  # fmt: skip
def test_both_gradients_in_one_pass(
    n: int, d: int, f: int, share: float, seed: int, dtype: torch.dtype, n_threads: int
) -> None:
    """Those of a pass each; and bit for bit the same on one thread."""
    generator = torch.Generator().manual_seed(seed)
    is_match = torch.rand(n, f, generator=generator) < share
    token, feature = (each.int() for each in is_match.nonzero().unbind(1))
    start = torch.cat([torch.zeros(1), is_match.sum(1).cumsum(0)]).int()
    value, unit = drawn(len(token), seed=seed), torch.nn.functional.normalize(drawn(f, d, seed=seed + 1), dim=1)
    grad, W = drawn(n, d, seed=seed + 2).to(dtype), unit.to(dtype)
    order, start_F = by_feature(feature, f)
    results = []
    for on in (n_threads, 1):
        with torch_threads(on):
            out = torch.full((f, d), torch.nan)
            grad_value, split = numba_backward.gradients(grad, W, value, token, start_F, order, unit_FD=unit, out=out)
            results.append([out, grad_value, *split])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    apart, square = torch.empty(f, d), torch.empty(f)
    numba_products.bags_and_totals(grad, token, value, start_F, order, out=apart, square_B=square)
    torch.testing.assert_close(square, apart.square().sum(1), rtol=1e-5, atol=0)
    products = numba_products.row_products(grad, W, feature, start)
    expected = [apart, products, *numba_adam.along_rows(apart, unit)]
    for one, other in zip(results[0], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_halted", [False, True])
def test_adam_leaves_rows_rounded_as_it_moves_them(is_halted: bool) -> None:
    """The same numbers whether rounded or not, on any number of threads; nothing where halted."""
    numbers = {"step": torch.tensor(3.0), "scale": torch.tensor(2.0), "halted": torch.tensor(is_halted)}
    betas = {"lr": 0.01, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8}
    start = [drawn(37, 53, seed=i) for i in range(3)]
    start[0] /= start[0].norm(dim=1, keepdim=True)
    found = []
    for n_threads in (1, 3):
        for is_rounded in (True, False):
            with torch_threads(n_threads):
                weight, gradient, mean = (each.clone() for each in start)
                square = mean.square()
                rounded = numba_rows.rounded(weight, torch.zeros(37), padded=64)
                before = [each.clone() for each in rounded]
                numba_adam.move_free(
                    weight, gradient, mean, square, rounded=rounded if is_rounded else None, **numbers, **betas
                )
                if is_rounded:
                    expected = before if is_halted else numba_rows.rounded(weight, torch.zeros(37), padded=64)
                    assert all(torch.equal(one, other) for one, other in zip(rounded, expected, strict=True))
                free = [weight, mean, square]
                unit, gradient, mean = (each.clone() for each in start)
                square, in_bf16 = mean.square(), torch.zeros(37, 53, dtype=torch.bfloat16)
                along, _ = numba_adam.along_rows(gradient, unit)
                numba_adam.move(
                    unit, gradient, along, mean, square, rounded_FD=in_bf16 if is_rounded else None, **numbers, **betas
                )
                if is_rounded:
                    assert torch.equal(in_bf16, torch.zeros_like(in_bf16) if is_halted else unit.bfloat16())
                found.append([*free, unit, mean, square])
    assert all(torch.equal(one, other) for each in found[1:] for one, other in zip(found[0], each, strict=True))
    exact, gradient, mean = (each.double() for each in start)
    gradient, square = gradient / 2, mean.square()
    mean, square = 0.9 * mean + 0.1 * gradient, 0.98 * square + 0.02 * gradient.square()
    root = (square / (1 - 0.98**3)).sqrt() + 1e-8
    moved = exact if is_halted else exact - 0.01 * (mean / (1 - 0.9**3)) / root
    torch.testing.assert_close(found[0][0].double(), moved, rtol=1e-5, atol=1e-7)
