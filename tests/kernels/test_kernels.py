"""The sparse path's values and gradients against dense autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_train import kernels
from sae_train.kernels import attaching, decoding, dense_product
from sae_train.ranks.interface import Solo
from tools.sparse_problems import Problem, gradients, problem, sparse_reconstruction

SMALL = settings(deadline=None, max_examples=25)


def use_every_slot(patch: pytest.MonkeyPatch) -> None:
    """Let products work on every slot, used or not, as on a GPU."""
    for module in (decoding, attaching):
        patch.setattr(module, "used_slots", lambda start, *given: given)


@pytest.mark.parametrize("on_host", [True, False], ids=["count read", "count on device"])
@SMALL
@given(n=st.integers(1, 20), d=st.integers(1, 9), f=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_values_and_gradients_are_dense_autograds(on_host: bool, n: int, d: int, f: int, seed: int) -> None:
    p = problem(n, d, f, seed=seed)
    target = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dense = torch.where(p.mask, torch.relu(p.x @ p.W_enc.t() + p.b_enc), 0)
    expected = dense @ p.W_dec
    with pytest.MonkeyPatch.context() as patch:
        if not on_host:  # what a GPU does: work on every slot, used or not
            use_every_slot(patch)
        value, found = sparse_reconstruction(p)
        sparse_gradients = gradients((found - target).square().sum() + (value**3 + value).sum(), p)
    dense_gradients = gradients((expected - target).square().sum() + (dense**3 + dense).sum(), p)
    assert torch.allclose(found, expected)
    for sparse, dense_one in zip(sparse_gradients, dense_gradients, strict=True):
        assert torch.allclose(sparse, dense_one)


def test_bf16_changes_no_product_on_a_cpu() -> None:
    p = problem(9, 6, 21, seed=3, dtype=torch.float32)
    for one, other in zip(sparse_reconstruction(p), sparse_reconstruction(p, "bf16"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("on_host", [True, False], ids=["count read", "count on device"])
def test_gradient_of_values(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dot product a match, and 0 in unused slots."""
    p = problem(9, 6, 21, seed=3)
    if not on_host:
        use_every_slot(monkeypatch)
    value = p.matches.value.clone().requires_grad_()
    upstream = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernels.decode(value, p.W_dec, *p.place).backward(upstream)
    used = int(p.matches.start[-1])
    assert used < len(value)
    dots = (upstream[p.matches.token.long()] * p.W_dec.detach()[p.matches.feature.long()]).sum(1)
    assert value.grad is not None
    assert torch.allclose(value.grad[:used], dots[:used])
    assert not value.grad[used:].any()


def test_unused_slots_change_nothing() -> None:
    """Their zeros point at token 0 and feature 0, which must not feel it, bit for bit."""
    p = problem(13, 5, 17, seed=2, dtype=torch.float32)
    used = int(p.matches.start[-1])
    exact = p._replace(matches=kernels.Matches(*(t[:used] for t in p.matches[:3]), p.matches.start))
    results = []
    for one in (p, exact):
        value, rows = sparse_reconstruction(one)
        results.append((rows, *gradients(rows.square().sum() + value.square().sum(), one)))
    for padded, tight in zip(*results, strict=True):
        assert torch.equal(padded, tight)


def test_an_order_of_other_features_is_found_anew() -> None:
    order, feature = kernels.FeatureOrder(), torch.tensor([2, 0, 1], dtype=torch.int32)
    first = order(feature, 3)
    assert order(feature, 3)[0] is first[0]
    assert order(torch.tensor([0, 2, 1], dtype=torch.int32), 3)[0].tolist() == [0, 2, 1]
    assert order(feature, 5)[1].tolist() == [0, 1, 2, 3, 3, 3]


@SMALL
@given(n=st.integers(1, 20), d=st.integers(1, 9), f=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_products_of_rows_and_sums_by_feature(n: int, d: int, f: int, seed: int) -> None:
    p = problem(n, d, f, seed=seed)
    found = kernels.row_products(p.x, p.W_dec, *p.place)
    used = int(p.matches.start[-1])
    assert not bool(found[used:].any())
    assert not found.requires_grad
    expected = torch.where(p.mask, p.x @ p.W_dec.t(), 0)
    sums = kernels.sums_by_feature(torch.stack([found, found**2], dim=1), p.matches.feature, n_features=f)
    torch.testing.assert_close(sums, torch.stack([expected.sum(0), (expected**2).sum(0)], dim=1).detach())
    torch.testing.assert_close(found[:used], expected.detach()[p.mask])


def test_gradient_of_what_was_not_kept_is_zero() -> None:
    p = problem(6, 4, 40, seed=5)
    _, rows = sparse_reconstruction(p)
    for grad in gradients(rows.square().sum(), p):
        assert not grad[~p.mask.any(0)].any()
        assert grad[p.mask.any(0)].any()


def test_no_match_at_all() -> None:
    p = problem(4, 3, 5, seed=0)
    none = kernels.select_batch(
        -torch.ones(4, 5, dtype=torch.float64), budget=7, capacity=7, n_features=5, ranks=Solo()
    )
    value, rows = sparse_reconstruction(p._replace(matches=none))
    assert not value.any()
    assert not rows.any()
    for grad in gradients(rows.sum() + value.sum(), p):
        assert not grad.any()


def test_fp32_path_is_as_exact_as_dense_fp32() -> None:
    """Against float64, the sparse products err no more than a few units of fp32 rounding."""
    exact, rounded = problem(64, 96, 256, seed=1), problem(64, 96, 256, seed=1)
    value, rows = sparse_reconstruction(exact)
    expected = gradients(rows.square().sum() + value.sum(), exact)
    half = Problem(
        *(t.detach().float() for t in rounded[:4]),
        rounded.matches._replace(value=rounded.matches.value.float()),
        rounded.mask,
    )
    for weight in (half.W_enc, half.b_enc, half.W_dec):
        weight.requires_grad_()
    value_32, rows_32 = sparse_reconstruction(half)
    found = gradients(rows_32.square().sum() + value_32.sum(), half)
    assert rows_32.dtype == torch.float32
    for one, other in zip((rows_32, *found), (rows, *expected), strict=True):
        assert float((one - other).detach().norm() / other.detach().norm()) < 1e-6


def test_sums_have_a_fixed_order() -> None:
    p = problem(64, 16, 128, seed=4, dtype=torch.float32)
    runs = [gradients(sparse_reconstruction(p)[1].square().sum(), p) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_affine_precisions() -> None:
    """On a CPU bf16 factors only find candidates, so this product is in fp32."""
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((40, 64), (80, 64), (80,)))
    exact = x.double() @ W.double().t() + b
    full = kernels.affine(x, W, b, precision="float32")
    double = kernels.affine(x.double(), W.double(), b.double(), precision="float64")
    assert double.dtype == torch.float64
    assert torch.allclose(double, exact)
    assert full.dtype == torch.float32
    assert float((full - exact).abs().max()) < 1e-4
    assert torch.equal(kernels.affine(x, W, b, precision="bf16"), full)
    assert not full.requires_grad


def test_affine_without_torchs_private_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's product and its public replacement differ by rounding, whole and in pieces."""
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((50, 24), (40, 24), (40,)))
    found = []
    for uses_onednn in (dense_product._prefers_onednn(), False):
        monkeypatch.setattr(dense_product, "_prefers_onednn", lambda uses=uses_onednn: uses)
        for size in (1 << 22, 40 * 16):
            monkeypatch.setattr(dense_product, "PIECE_ELEMENTS", size)
            out = torch.full((50, 40), torch.nan)
            assert kernels.affine(x, W, b, precision="float32", out=out) is out
            found += [out, kernels.affine(x, W, b, precision="float32")]
    for each in found:
        torch.testing.assert_close(each, x @ W.t() + b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype: torch.dtype) -> None:
    """An exported autoencoder may be cast to it."""
    p = problem(9, 8, 20, seed=3)
    value, W = p.matches.value.to(dtype).requires_grad_(), p.W_dec.detach().to(dtype).requires_grad_()
    rows = kernels.decode(value, W, *p.place)
    found = torch.autograd.grad(rows.square().sum(), (value, W))
    value, W = (each.detach().double().requires_grad_() for each in (value, W))
    expected = torch.autograd.grad(kernels.decode(value, W, *p.place).square().sum(), (value, W))
    for each, exact in zip(found, expected, strict=True):
        assert float((each.double() - exact).norm()) < 0.05 * float(exact.norm())
