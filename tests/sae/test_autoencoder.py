"""The exported autoencoder: folding, its two rules, dense and sparse codes, shapes and errors; the dictionary."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_train.sae import autoencoder
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.code import SparseCode
from sae_train.sae.trainable import ENCODER_SCALE, TrainableAutoencoder
from tools.small_runs import CPU, kept_by_sorting

D, F = 6, 20
BOTH_RULES = pytest.mark.parametrize("inference", ["threshold", "topk"])


def trained(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> TrainableAutoencoder:
    """A dictionary whose biases and decoder norms are not what they start as."""
    dictionary = TrainableAutoencoder.initial(d_model=D, n_features=F, seed=seed, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return dictionary


def exported(inference: str, *, k: float = 3.0, seed: int = 0) -> SparseAutoencoder:
    sae = SparseAutoencoder.fold(
        trained(seed=seed), centre_D=torch.linspace(-2, 3, D).double(), scale=4.0, k=k, inference=inference
    )
    if inference == "threshold":
        sae.threshold += 0.5
        sae.threshold[::7] = torch.inf
    return sae


def raw(*shape: int, seed: int = 1) -> torch.Tensor:
    return 4 * torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-2, 3, D)


def test_folding_is_exact() -> None:
    """Codes on raw activations are scale times those on normalised ones; reconstructions are the same."""
    dictionary, centre, scale = trained(), torch.linspace(-2, 3, D).double(), 4.0
    sae = SparseAutoencoder.fold(dictionary, centre_D=centre, scale=scale, k=3, inference="threshold")
    x_raw = raw(50)
    x = (x_raw.double() - centre) / scale
    W_enc, b_enc, W_dec, b_dec = (p.detach().double() for p in dictionary.parameters())
    f = torch.relu(x @ W_enc.t() + b_enc)
    x_hat = (f @ W_dec + b_dec) * scale + centre
    assert torch.allclose(sae.encode(x_raw).double(), f * scale * W_dec.norm(dim=1), atol=1e-5)
    assert torch.allclose(sae(x_raw).double(), x_hat, atol=1e-5)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F))
    assert sae.W_enc.shape == (D, F)
    assert sae.W_enc.is_contiguous()
    assert {p.dtype for p in (*sae.parameters(), sae.threshold)} == {torch.float32}
    assert not sae.training


@BOTH_RULES
@settings(deadline=None, max_examples=20)
@given(shape=st.lists(st.integers(0, 5), max_size=3), seed=st.integers(0, 1000))
def test_dense_and_sparse_agree_exactly(inference: str, shape: list[int], seed: int) -> None:
    sae, x = exported(inference), raw(*shape, seed=seed)
    dense, code = sae.encode(x), sae.encode_sparse(x)
    assert dense.shape == (*shape, F)
    assert torch.equal(code.dense(), dense)
    assert code.shape == tuple(shape)
    assert len(code.value) == int(code.count) == int((dense > 0).sum())
    assert code.feature.dtype == code.token.dtype == code.start.dtype == torch.int32
    x_hat = sae.decode(code)
    assert x_hat.shape == x.shape
    assert torch.allclose(x_hat, sae.decode(dense), atol=1e-5)
    assert torch.equal(sae(x), x_hat)


@BOTH_RULES
def test_chunks_change_nothing(inference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = exported(inference), raw(7, 9)
    whole, code = sae.encode(x), sae.encode_sparse(x)
    monkeypatch.setattr(autoencoder, "CHUNK_BYTES", 4 * F * 5)
    assert len(list(sae.pre_activations(x))) == 13
    assert torch.allclose(sae.encode(x), whole)
    again = sae.encode_sparse(x)
    assert torch.equal(again.dense(), sae.encode(x))
    for name in ("feature", "token", "start"):
        assert torch.equal(getattr(again, name), getattr(code, name))


def test_threshold_rule_is_strict() -> None:
    sae = exported("threshold")
    x = raw(30)
    pre = torch.cat(list(sae.pre_activations(x))).detach()
    sae.threshold.copy_(pre[3].clamp(min=0))
    f = sae.encode(x)
    assert not f[3].any()
    assert torch.equal(f, torch.where(pre > sae.threshold, pre, 0))
    sae.threshold.fill_(torch.inf)
    assert not sae.encode(x).any()


def test_topk_rule_breaks_ties_to_the_lower_feature() -> None:
    sae = exported("topk", k=3.0)
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc.round())
        sae.b_enc.copy_(sae.b_enc.round())
    x = raw(40).round()
    pre = torch.cat(list(sae.pre_activations(x))).detach()
    kept = {(t, f) for t, f in (sae.encode(x) > 0).nonzero().tolist()}
    assert kept == kept_by_sorting(pre, group="row", budgets=[3] * 40)


@pytest.mark.parametrize("k", [19.6, 20.0, 400.0])
def test_topk_of_everything(k: float) -> None:
    sae, x = exported("topk", k=k), raw(10)
    assert torch.equal(sae.encode(x), torch.relu(torch.cat(list(sae.pre_activations(x)))))


def test_any_float_dtype_comes_in_and_fp32_goes_out() -> None:
    sae, x = exported("threshold"), raw(5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(sae.encode(x.to(dtype)), sae.encode(x.to(dtype).float()))
        assert sae(x.to(dtype)).dtype == torch.float32


@BOTH_RULES
def test_codes_and_reconstructions_have_gradients(inference: str) -> None:
    """For those who train on: the sparse forward has the gradient of the dense one."""
    sae, x = exported(inference), raw(12)
    parameters = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    sparse = torch.autograd.grad((sae(x) - x).square().sum(), parameters)
    dense = torch.autograd.grad((sae.decode(sae.encode(x)) - x).square().sum(), parameters)
    for one, other in zip(sparse, dense, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)


def test_wrong_widths_are_named() -> None:
    sae = exported("threshold")
    with pytest.raises(ValueError, match=r"shape \(3, 7\).*must be 6"):
        sae.encode(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"codes of 4 features.*n_features=20"):
        sae.decode(torch.zeros(3, 4))
    empty = torch.zeros(0, dtype=torch.int32)
    code = SparseCode(
        value=torch.zeros(0), feature=empty, token=empty, start=empty.new_zeros(2), shape=(1,), n_features=9
    )
    with pytest.raises(ValueError, match="codes of 9 features"):
        sae.decode(code)
    with pytest.raises(ValueError, match="inference='relu'"):
        SparseAutoencoder.fold(trained(), centre_D=torch.zeros(D), scale=1.0, k=1, inference="relu")


def test_dictionary_starts_with_unit_rows_and_the_encoder_as_their_scaled_copy() -> None:
    before = torch.get_rng_state()
    one = TrainableAutoencoder.initial(d_model=D, n_features=F, seed=3, dtype=torch.float64, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(one.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
    assert torch.equal(one.W_enc, ENCODER_SCALE * one.W_dec)
    assert not one.b_enc.any()
    assert not one.b_dec.any()
    other = TrainableAutoencoder.initial(d_model=D, n_features=F, seed=4, dtype=torch.float64, device=CPU)
    assert not torch.equal(other.W_dec, one.W_dec)


@BOTH_RULES
@pytest.mark.parametrize("spoiler", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_activations_without_a_code_are_refused_and_not_given_zeros(
    inference: str, spoiler: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in the third of four chunks; 3e38 is finite, and its products are not."""
    monkeypatch.setattr(autoencoder, "CHUNK_BYTES", 4 * F * 4)
    sae, x = exported(inference), raw(3, 5)
    sae.encode(x)
    x[1, 4] = spoiler
    for use in (sae.encode, sae.encode_sparse, sae):
        with pytest.raises(ValueError, match=r"x: row 9 of 15 has no finite code"):
            use(x)
    assert sae.encode(x, check_finite=False).shape == (3, 5, F)
    assert sae.encode_sparse(x, check_finite=False).shape == (3, 5)


def test_codes_in_half_precision_are_not_refused_for_their_sum() -> None:
    """The sum of a row's pre-activations is beyond float16, and every one of them is not."""
    sae = exported("threshold")
    wide = autoencoder.SparseAutoencoder(
        **{name: getattr(sae, name).repeat(1, 4000) for name in ("W_enc",)},
        b_enc=(sae.b_enc - 3).repeat(4000),
        W_dec=sae.W_dec.repeat(4000, 1),
        b_dec=sae.b_dec,
        threshold=sae.threshold.repeat(4000),
        k=sae.k,
        inference="threshold",
        config={},
    ).half()
    x = raw(3).half()
    total = next(iter(wide.pre_activations(x))).float().sum(1)
    assert total.abs().max() > torch.finfo(torch.float16).max
    assert wide.encode(x).isfinite().all()


@BOTH_RULES
def test_no_tokens_have_no_code(inference: str) -> None:
    sae = exported(inference)
    assert sae.encode(raw(0)).shape == (0, F)
    assert sae(raw(2, 0)).shape == (2, 0, D)
