"""Thresholds set on one half of held-out tokens meet their target on the other."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae_train.ranks.interface import Solo
from sae_train.sae import autoencoder, calibration
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.calibration import Calibration
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers import Sparsifier
from sae_train.sparsifiers.feature_choice import FeatureChoice
from tools.sae_parts import selected, sparsifier_of
from tools.small_runs import CPU, kept_by_sorting, run_config

D, F, BATCH = 16, 128, 256
END = StepInfo(step=40, tokens=40 * BATCH, total_tokens=40 * BATCH, batch_tokens=BATCH, learning_rate=1e-3, seed=0)


class Case(NamedTuple):
    name: str
    budget: str
    bias: float


CASES = [
    Case("topk", "pooled", 0.0),
    Case("mutual_choice", "pooled", 0.0),
    Case("mutual_choice", "pooled", -0.75),  # most affinities are not positive: the budget runs out
    Case("feature_choice", "uniform", 0.0),
    Case("feature_choice", "zipf", 0.0),
    Case("feature_choice", "zipf", -0.5),
]


def tokens(n: int, *, seed: int) -> Tensor:
    """Tokens of a few directions each, so that affinities have heavy tails and differ between features."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(99))
    fires = torch.rand(n, 40, generator=generator) < 0.1
    return 2 + (fires * torch.rand(n, 40, generator=generator)) @ directions


def setup(case: Case, *, k: float = 6.0) -> tuple[SparseAutoencoder, Sparsifier]:
    config = run_config(sparsifier=case.name, budget=case.budget, k=k, batch_tokens=BATCH, tokens=END.total_tokens)
    sparsifier = sparsifier_of(config, n_features=F)
    dictionary = TrainableAutoencoder.initial(d_model=D, n_features=F, seed=1, dtype=torch.float32, device=CPU)
    sample = tokens(2000, seed=5)
    centre = sample.mean(0)
    scale = float((sample - centre).square().sum(1).mean().sqrt())
    with torch.no_grad():
        dictionary.W_enc.copy_(dictionary.W_dec)  # rows as long as a trained encoder's
        dictionary.b_enc += case.bias
    inference = sparsifier.export(dictionary, END).inference
    sae = SparseAutoencoder.fold(dictionary, centre_D=centre.double(), scale=scale, k=k, inference=inference)
    return sae, sparsifier


def calibrate(sae: SparseAutoencoder, raw: Tensor, sparsifier: Sparsifier) -> Calibration:
    share_F = sparsifier.shares(END) if isinstance(sparsifier, FeatureChoice) else None
    k = sparsifier.k_at(END)
    return calibration.calibrate(sae, raw, k=k, share_F=share_F, batch_tokens=BATCH, n_features=F, ranks=Solo())


def l0(sae: SparseAutoencoder, found: Calibration, raw: Tensor) -> Tensor:
    sae.threshold.copy_(found.threshold_F)
    return (sae.encode(raw) > 0).sum(1).double()


def matches_of_training(sae: SparseAutoencoder, sparsifier: Sparsifier, raw: Tensor, *, draws: int = 1) -> float:
    """Mean matches a token of training's own selection, batch by batch."""
    total = 0
    for draw in range(draws):
        for batch in raw.split(BATCH):
            info = StepInfo(step=draw, tokens=0, total_tokens=1, batch_tokens=len(batch), learning_rate=1e-3, seed=draw)
            pre = torch.cat(list(sae.pre_activations(batch))).detach()
            total += int(selected(sparsifier, pre, info).count)
    return total / draws / len(raw)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.budget}-{case.bias}")
def test_fresh_tokens_meet_the_target(case: Case) -> None:
    sae, sparsifier = setup(case)
    found = calibrate(sae, tokens(20 * BATCH, seed=10), sparsifier)
    assert found.threshold_F.dtype == torch.float32
    assert found.threshold_F.shape == (F,)
    assert bool((found.threshold_F >= 0).all())
    assert found.target_l0 == pytest.approx(6.0 * found.used_share)
    fresh = l0(sae, found, tokens(20 * BATCH, seed=11))
    standard_error = float(fresh.std()) * math.sqrt(2 / len(fresh))  # of the difference of two halves
    assert abs(float(fresh.mean()) - found.target_l0) <= max(0.02 * found.target_l0, 3 * standard_error)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.budget}-{case.bias}")
def test_target_is_what_training_would_use(case: Case) -> None:
    sae, sparsifier = setup(case)
    half = tokens(3 * BATCH + 100, seed=10)
    found = calibrate(sae, half, sparsifier)
    used = matches_of_training(sae, sparsifier, half, draws=8 if case.budget == "zipf" else 1)
    assert found.target_l0 == pytest.approx(used, rel=3e-3)
    assert (found.used_share < 0.99) == (case.bias < 0)


def test_one_threshold_is_exact_on_its_own_half() -> None:
    case = Case("mutual_choice", "pooled", 0.0)
    sae, sparsifier = setup(case)
    half = tokens(4 * BATCH, seed=10)
    found = calibrate(sae, half, sparsifier)
    assert len(found.threshold_F.unique()) == 1
    pre = torch.cat(list(sae.pre_activations(half))).detach()
    kept = {(t, f) for t, f in (pre > found.threshold_F).nonzero().tolist()}
    assert kept == kept_by_sorting(pre, group="batch", budgets=[6 * len(half)])


def test_unused_budget_of_one_batch_is_not_spent_on_another() -> None:
    """As in training, where a batch without positive affinities leaves its matches to no one."""
    sae, sparsifier = setup(Case("mutual_choice", "pooled", -0.75))
    centre = tokens(2000, seed=5).mean(0)
    half = torch.cat([centre + 4 * (tokens(BATCH, seed=10) - centre), centre.expand(BATCH, D)])
    found = calibrate(sae, half, sparsifier)
    assert found.used_share == pytest.approx(0.5)
    assert float(l0(sae, found, half).mean()) == found.target_l0 == pytest.approx(3.0)


def test_many_thresholds_are_unbiased_on_few_tokens() -> None:
    """A cut between the c-th and the next would add half a match a feature: here 4% of L0."""
    sae, sparsifier = setup(Case("feature_choice", "uniform", 0.0))
    errors = []
    for seed in range(48):
        generator = torch.Generator().manual_seed(seed)
        half, fresh = torch.randn(2, BATCH, D, generator=generator)
        found = calibrate(sae, half, sparsifier)
        errors.append(float(l0(sae, found, fresh).mean()) / found.target_l0 - 1)
    mean = sum(errors) / len(errors)
    spread = (sum((e - mean) ** 2 for e in errors) / len(errors) / (len(errors) - 1)) ** 0.5
    assert abs(mean) < 3 * spread
    assert spread < 0.012


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.budget}-{case.bias}")
def test_chunks_and_first_guess_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, sparsifier = setup(case)
    half = tokens(5 * BATCH, seed=10)
    whole = calibrate(sae, half, sparsifier)
    monkeypatch.setattr(autoencoder, "CHUNK_BYTES", 4 * F * 100)
    monkeypatch.setattr(calibration, "CHUNK_BYTES", 4 * F * 100)
    monkeypatch.setattr(calibration, "SAMPLE_MARGIN", 0.1)  # a bound that is too high must be noticed
    chunked = calibrate(sae, half, sparsifier)
    assert torch.allclose(whole.threshold_F, chunked.threshold_F, atol=1e-5)
    assert chunked.target_l0 == pytest.approx(whole.target_l0, rel=1e-5)


def test_a_feature_without_a_positive_affinity_never_fires() -> None:
    sae, sparsifier = setup(Case("feature_choice", "zipf", 0.0))
    with torch.no_grad():
        sae.b_enc[[3, 90]] = -1000.0
    found = calibrate(sae, tokens(4 * BATCH, seed=10), sparsifier)
    assert found.threshold_F[[3, 90]].tolist() == [math.inf, math.inf]
    assert int(found.threshold_F.isinf().sum()) == 2


def test_a_feature_that_always_uses_all_it_has_gets_zero() -> None:
    sae, sparsifier = setup(Case("feature_choice", "uniform", 0.0))
    half = tokens(4 * BATCH, seed=10)
    pre = torch.cat(list(sae.pre_activations(half))).detach()
    with torch.no_grad():
        sae.b_enc[5] -= pre[:, 5].sort().values[-3:].mean()  # two tokens stay positive
    found = calibrate(sae, half, sparsifier)
    assert float(found.threshold_F[5]) == 0


def test_all_affinities_negative() -> None:
    for case in CASES:
        sae, sparsifier = setup(case._replace(bias=-1e4))
        found = calibrate(sae, tokens(300, seed=1), sparsifier)
        assert found.target_l0 == 0
        assert not l0(sae, found, tokens(300, seed=2)).any()


def test_no_tokens_is_an_error() -> None:
    sae, sparsifier = setup(CASES[1])
    with pytest.raises(ValueError, match="no tokens"):
        calibrate(sae, torch.zeros(0, D), sparsifier)
