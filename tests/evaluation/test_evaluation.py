"""Figures against their definitions, written out slowly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_train.evaluation.density import density_figures, density_histogram
from sae_train.evaluation.evaluate import decoder_cosine_max
from sae_train.evaluation.reconstruction import ReconstructionTotals, histogram_percentiles
from sae_train.evaluation.spread import reconstruct
from sae_train.ranks.interface import Solo
from tools.random_sae import random_sae


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), offset=st.sampled_from([0.0, 100.0]), batches=st.integers(1, 4))
def test_figures_are_their_definitions(seed: int, offset: float, batches: int) -> None:
    sae = random_sae(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12 * batches, 6, generator=generator) + offset
    context = torch.arange(12 * batches) // 4
    totals = ReconstructionTotals(shift_D=sae.b_dec, n_features=10, ranks=Solo())
    for part, where in zip(x.split(12), context.split(12), strict=True):
        totals.add(part, where, reconstruct(sae, part, n_features=10, ranks=Solo()))
    got = totals.figures()
    with torch.no_grad():
        codes = sae.encode(x)
        error = (x - sae.decode(codes)).double()
    wide = x.double()
    fires = codes > 0
    expected = {
        "fvu": float(error.square().sum() / (wide - wide.mean(0)).square().sum()),
        "nmse": float((error.square().sum(1) / wide.square().sum(1)).mean()),
        "l0": float(fires.sum(1).double().mean()),
        "dead_fraction": float((fires.sum(0) == 0).double().mean()),
        "evaluation_tokens": len(x),
    }
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-4), key
    per_context = fires.sum(1).view(-1, 4).double().mean(1)  # equal contexts: the plain standard error
    if len(per_context) > 1:
        assert got["l0_standard_error"] == pytest.approx(
            float(per_context.std() / math.sqrt(len(per_context))), abs=1e-9
        )
    torch.testing.assert_close(totals.density(), fires.double().mean(0))


def test_rows_of_zeros_count_for_everything_but_ratios() -> None:
    sae = random_sae()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    x[::4] = 0
    totals = ReconstructionTotals(shift_D=sae.b_dec, n_features=10, ranks=Solo())
    totals.add(x, torch.arange(20) // 4, reconstruct(sae, x, n_features=10, ranks=Solo()))
    got = totals.figures()
    some = x.norm(dim=1) > 0
    with torch.no_grad():
        error = (x - sae(x)).double().square().sum(1)
    assert got["nmse"] == pytest.approx(float((error[some] / x[some].double().square().sum(1)).mean()), rel=1e-4)
    assert got["evaluation_tokens"] == 20


def test_percentiles_are_order_statistics() -> None:
    values = torch.tensor([0, 0, 1, 5, 5, 5, 9, 9, 9, 9])
    counts = torch.bincount(values, minlength=12)
    assert histogram_percentiles(counts, (0.05, 0.5, 0.95)) == [0, 5, 9]


def test_zipf_exponent_and_gini_of_known_densities() -> None:
    ranks = torch.arange(1, 1001, dtype=torch.float64)
    figures = density_figures(0.3 * (ranks + 20) ** -0.8)
    assert [figures[f"zipf_{key}"] for key in ("exponent", "shift", "r2")] == pytest.approx([0.8, 20, 1.0], rel=1e-3)
    equal = density_figures(torch.full((100,), 0.2))
    assert equal["gini"] == pytest.approx(0.0, abs=1e-9)
    assert equal["above_10pct"] == 1.0
    one = torch.zeros(100)
    one[3] = 0.05
    assert density_figures(one)["gini"] == pytest.approx(0.99)
    assert "gini" not in density_figures(torch.zeros(10))


def test_every_feature_is_in_the_histogram() -> None:
    histogram = density_histogram(torch.tensor([0.0, 1e-5, 1.0, 0.5]), 1000)
    assert len(histogram) == 50
    assert sum(histogram) == 4
    assert histogram[-1] == 1


def test_decoder_cosine_max_leaves_out_the_feature_itself() -> None:
    W_dec = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    cosine = W_dec @ W_dec.T
    cosine.fill_diagonal_(-1)
    torch.testing.assert_close(decoder_cosine_max(W_dec, n_features=30, ranks=Solo()), cosine.max(1).values)
