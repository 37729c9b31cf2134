"""Figures against their definitions, written out slowly."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_train.evaluation.decoder_cosine import decoder_cosine_max
from sae_train.evaluation.density import density_figures, density_histogram
from sae_train.evaluation.l0 import histogram_percentiles
from sae_train.evaluation.metric import EvaluationBatch, Subject, Sums
from sae_train.evaluation.registry import METRICS, figures_in_rows
from sae_train.evaluation.sharded_forward import reconstruct
from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.random_sae import random_sae


def measured(sae: SparseAutoencoder, x: Tensor, context: Tensor, *, batch: int) -> dict[str, Any]:
    """Return the figures of every metric, from batches of so many tokens and without a language model."""
    subject = Subject(sae=sae, site="here", centre_D=sae.b_dec.detach(), n_features=sae.n_features, ranks=Solo())
    metrics = [metric(subject) for metric in METRICS]
    for raw, where in zip(x.split(batch), context.split(batch), strict=True):
        made = reconstruct(sae, raw, n_features=sae.n_features, ranks=Solo())
        for metric in metrics:
            metric.update(EvaluationBatch(raw_ND=raw, context_N=where, baseline=None), made)
    return {name: value for metric in metrics for name, value in metric.figures(Solo()).items()}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), offset=st.sampled_from([0.0, 100.0]), batches=st.integers(1, 4))
def test_figures_are_their_definitions(seed: int, offset: float, batches: int) -> None:
    sae = random_sae(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12 * batches, 6, generator=generator) + offset
    context = torch.arange(12 * batches) // 4
    got = measured(sae, x, context, batch=12)
    with torch.no_grad():
        codes = sae.encode(x)
        error = (x - sae.decode(codes)).double()
    wide = x.double()
    fires = codes > 0
    expected = {
        "fvu": float(error.square().sum() / (wide - wide.mean(0)).square().sum()),
        "nmse": float((error.square().sum(1) / wide.square().sum(1)).mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(wide, wide - error, dim=1).mean()),
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
    assert got["density"] == pytest.approx(density_figures(fires.double().mean(0)), rel=1e-9)


def test_rows_of_zeros_count_for_everything_but_ratios() -> None:
    sae = random_sae()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    x[::4] = 0
    got = measured(sae, x, torch.arange(20) // 4, batch=20)
    some = x.norm(dim=1) > 0
    with torch.no_grad():
        error = (x - sae(x)).double().square().sum(1)
    assert got["nmse"] == pytest.approx(float((error[some] / x[some].double().square().sum(1)).mean()), rel=1e-4)
    assert got["evaluation_tokens"] == 20


def test_without_tokens_only_what_needs_none_is_there() -> None:
    assert measured(random_sae(), torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), batch=1).keys() == {
        "density", "decoder_cosine_max",
    }  # fmt: skip


def test_figures_in_rows_are_figures() -> None:
    sae = random_sae()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    there = measured(sae, x, torch.arange(20) // 4, batch=8)
    of_a_language_model = {"delta_ce", "kl", "ce_recovered"}
    assert figures_in_rows() - of_a_language_model <= there.keys()
    assert {"fvu", "nmse", "cosine", "l0", "dead_fraction", "decoder_cosine_max"} <= figures_in_rows()


def test_sums_add_up_by_name() -> None:
    sums = Sums("tokens", "error", device=torch.device("cpu"))
    sums.add(tokens=3, error=torch.tensor(0.5))
    sums.add(error=torch.tensor(0.25), tokens=torch.tensor(4))
    assert sums.over(Solo()) == {"tokens": 7.0, "error": 0.75}
    with pytest.raises(AssertionError, match="error"):
        sums.add(tokens=1)


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
