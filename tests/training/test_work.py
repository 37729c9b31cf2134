"""Counts of a step's work against counts by hand."""

from typing import Any

import pytest

from sae_train.sae.sizes import SaeSizes
from sae_train.training.work import CALLS, Share, Work, step_work
from tools.small_runs import run_config

N, D, F, K = 512, 64, 2048, 8
M = N * K
GPU = {"on_gpu": True}


def parts(sparsifier: str = "mutual_choice", aux: str = "none", **share: Any) -> dict[str, Work]:
    sizes = SaeSizes(d_model=D, n_features=F, batch_tokens=N, dead_window=100)
    return step_work(Share(config=run_config(sparsifier=sparsifier, aux=aux, k=float(K)).sae, sizes=sizes, **share))


@pytest.mark.parametrize("share", [{}, GPU])
def test_a_step_is_the_encoder_product_four_products_of_matches_and_adam(share: dict[str, Any]) -> None:
    found = parts(**share)
    assert found["encode"].operations == 2 * N * D * F
    assert found["encode"].streamed >= 4 * N * F
    assert found["select"].scanned == 4 * N * F
    assert found["select"].ordered >= M
    assert found["decode"].gathered == 4 * M * D * 4
    assert 28 * 2 * D * F <= found["update"].streamed <= 3 * 28 * 2 * D * F
    assert set(found) == {"encode", "select", "decode", "update", "rest"}


def test_columns_are_read_twice() -> None:
    assert parts("feature_choice")["select"].scanned == 2 * parts("topk")["select"].scanned


def test_a_harvested_gradient_takes_a_second_product() -> None:
    assert parts("gradient")["encode"].operations == 2 * parts("topk")["encode"].operations


def test_a_rank_computes_its_share() -> None:
    whole = parts()
    for split in (parts(rows=4), parts(columns=4)):
        assert split["encode"].operations == whole["encode"].operations / 4
        assert split["select"].scanned == whole["select"].scanned / 4
        assert split["decode"].gathered == whole["decode"].gathered / 4
    assert parts(columns=4)["update"].streamed == whole["update"].streamed / 4
    assert parts(rows=4)["update"].streamed == whole["update"].streamed


def test_ranks_send_the_bytes_of_the_document() -> None:
    """See docs/ranks.md: an all-reduce of b bytes counts 2 b (R - 1) / R."""
    gradients, counts = 4 * (2 * F * D + F + D), 8 * F
    assert parts(rows=4)["communication"].sent == 12 * 16 * 1024 + 1.5 * (gradients + counts)
    assert parts(columns=4)["communication"].sent == 12 * 16 * 1024 + 1.5 * 4 * N * D
    assert parts(aux="aux_k", columns=4)["communication"].sent == 12 * 16 * 1024 + 2 * 1.5 * 4 * N * D
    assert parts("topk", rows=4)["communication"].sent == 1.5 * (gradients + counts)
    assert parts("topk", columns=4)["communication"].sent == 1.5 * 4 * N * D + 0.75 * 4 * N * K


def test_an_auxiliary_loss_is_counted_on_dead_features_alone_on_a_cpu() -> None:
    found = parts(aux="aux_k")["auxiliary"]
    assert 0 < found.scanned < 4 * N * F
    assert found.gathered < parts()["decode"].gathered
    assert parts(aux="aux_k", **GPU)["auxiliary"].scanned > 4 * N * F


def test_every_part_starts_operators() -> None:
    assert all(work.calls >= CALLS[name] for name, work in parts(aux="aux_k").items())
