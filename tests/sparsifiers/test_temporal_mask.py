"""Adaptive temporal masking: importance against a slow reference, masks by the formula, and what they leave alone."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_train.cli.compose import compose_config
from sae_train.errors import ConfigError
from sae_train.ranks.interface import Solo
from sae_train.sae.code import Code, DenseCode, SparseCode
from sae_train.sae.losses import reconstruct
from sae_train.sae.random import keyed_generator
from sae_train.sparsifiers import penalised
from sae_train.sparsifiers.base import Encoding
from sae_train.sparsifiers.temporal_mask import TemporalMask
from sae_train.training.trainer import Trainer
from tools import grid_world as world
from tools import sae_parts
from tools.one_of_each import only, only_export

AT_ONCE = ["sparsifier.warmup=0", "sparsifier.ramp=0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    world.write_activations(folder)
    return folder


def trainer_of(rows: Path, *overrides: str, steps: int = 60, precision: str = "float64") -> Trainer:
    typed = ["sparsifier=temporal_mask", *overrides]
    return world.build(world.config_of(rows, typed, precision=precision, steps=steps, n_features=128), Solo())


def mask_of(trainer: Trainer) -> TemporalMask:
    assert isinstance(trainer.learners[0].sparsifier, TemporalMask)
    return trainer.learners[0].sparsifier


def learn(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.step(trainer.stream.batch(trainer.n_done))


def encoded(trainer: Trainer) -> tuple[Tensor, Code, Code, Tensor]:
    """Return the next batch, its code, the decoded part and the penalty, without a step."""
    x = only(trainer.stream.batch(trainer.n_done)).x_ND
    code, decoded, penalty = sae_parts.encoded(trainer, x)
    assert penalty is not None
    return x, code, decoded, penalty


def dense(code: Code) -> Tensor:
    return code.value if isinstance(code, DenseCode) else code.dense()


def watch(trainer: Trainer) -> list[Tensor]:
    """Return a list to which every step adds what each feature does on its batch, before the update."""
    seen: list[Tensor] = []
    encode = trainer.learners[0].sparsifier.encode

    def watched(*parts: Any) -> Encoding:
        seen.append(slow_sums(trainer, only(trainer.stream.batch(trainer.n_done)).x_ND))
        return encode(*parts)

    trainer.learners[0].sparsifier.encode = watched
    return seen


def slow_sums(trainer: Trainer, x_ND: Tensor) -> Tensor:
    """Return the mean value, firing share and contribution of each feature on a batch [F, 3], by ablation.

    The ablations are of the unmasked reconstruction.
    """
    dictionary = trainer.learners[0].dictionary
    with torch.no_grad():
        code_NF = (x_ND @ dictionary.W_enc.t() + dictionary.b_enc).relu()
        whole_ND = code_NF @ dictionary.W_dec + dictionary.b_dec
        found = []
        for feature in range(dictionary.n_features):
            without_ND = whole_ND - code_NF[:, feature, None] * dictionary.W_dec[feature]
            growth = (x_ND - without_ND).square().sum(1) - (x_ND - whole_ND).square().sum(1)
            value = code_NF[:, feature]
            found.append([float(value.mean()), float((value > 0).double().mean()), float(growth.mean()) / 2])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dense_from", "kind"),
    [(1, ["parametrisation=aligned"]), (10**9, ["nesting=matryoshka", "nesting.prefixes=[0.25,0.5,1.0]"])],
    ids=["sparse, aligned", "dense, nested"],
)
def test_importance_is_of_what_features_do_unmasked(
    rows: Path, dense_from: int, kind: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving averages with a half-life in tokens, of all steps since the first, masked or not."""
    monkeypatch.setattr(penalised, "DENSE_FROM", dense_from)
    typed = [*AT_ONCE, "sparsifier.half_life=100", "sparsifier.strength=3", "sparsifier.deviations=0.5"]
    trainer = trainer_of(rows, *typed, *kind)
    each, mask, was_masked = watch(trainer), mask_of(trainer), 0
    for _ in range(25):
        learn(trainer, 1)
        was_masked += int((~mask._left_F).sum()) if mask._left_F is not None else 0
    assert was_masked > 100
    weights = [0.5 ** ((len(each) - 1 - step) * world.N / 100) for step in range(len(each))]
    expected = sum(w * one for w, one in zip(weights, each, strict=True)) / sum(weights)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(mask.averages_F3, expected, rtol=1e-9, atol=1e-15)


def test_probabilities_are_the_formula(rows: Path) -> None:
    trainer = trainer_of(rows, "sparsifier.deviations=0.3", "sparsifier.strength=4", "sparsifier.warmup=0.2")
    mask = mask_of(trainer)
    generator = torch.Generator().manual_seed(0)
    mask.averages_F3 = torch.rand(128, 3, generator=generator, dtype=torch.float64) ** 2
    mask.averages_F3[:3, 2] = -0.1
    rows_of_three = [[max(0.0, value) for value in row] for row in mask.averages_F3.tolist()]
    importance = [(m * q * c) ** (1 / 3) for m, q, c in rows_of_three]
    mean = sum(importance) / 128
    sigma = math.sqrt(sum((one - mean) ** 2 for one in importance) / 128)
    theta = mean + 0.3 * sigma
    expected = [min(0.9, 1 - math.exp(-2.5 * max(theta - one, 0) / theta)) for one in importance]
    found = mask._probabilities(2.5, Solo())
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    assert found[0] == 0.9
    assert 20 < int((found == 0).sum()) < 100
    mask.averages_F3 = mask.averages_F3 * torch.tensor([3.0, 0.1, 700.0])  # the units of the three do not matter
    assert mask._probabilities(2.5, Solo()).tolist() == pytest.approx(expected, rel=1e-9)
    mask.averages_F3 = torch.zeros_like(mask.averages_F3)
    assert not bool(mask._probabilities(2.5, Solo()).any())  # nothing has fired yet


def test_nothing_is_masked_at_first_then_ever_more(rows: Path) -> None:
    trainer = trainer_of(rows, "sparsifier.warmup=0.2", "sparsifier.ramp=0.5", steps=50)
    mask, n = mask_of(trainer), world.N
    strengths = [mask.strength_at(step * n, 50 * n) for step in (0, 9, 10, 20, 35, 49)]
    assert strengths == pytest.approx([0, 0, 0, 0.4, 1, 1])
    for step in range(14):
        learn(trainer, 1)
        assert (mask._left_F is None) == (step <= 10)
        assert bool(mask.masked_F.any()) == (step >= 10)  # of the step after it
        assert mask.figures(trainer.learners[0].step_info(trainer.n_done))["train/masked_share"] == pytest.approx(
            float(mask.masked_F.mean())
        )
    plain, unit = trainer_of(rows, "sparsifier.warmup=0.9"), ["sparsifier=relu", "sparsifier.norms=unit"]
    relu = world.build(world.config_of(rows, unit, precision="float64", steps=60, n_features=128), Solo())
    for each in (plain, relu):
        learn(each, 8)
    for name, value in world.weights(plain).items():
        assert torch.equal(value, world.weights(relu)[name]), name


def test_masks_are_drawn_with_their_probabilities_by_seed_and_step_alone(rows: Path) -> None:
    trainer = trainer_of(rows, *AT_ONCE, steps=400)
    mask = mask_of(trainer)
    mask.masked_F = torch.linspace(0, 0.9, 128, dtype=torch.float64)
    before = torch.get_rng_state()
    total = torch.zeros(128, dtype=torch.float64)
    for step in range(400):
        trainer.n_done = step
        left_F = mask._draw(trainer.learners[0].step_info(trainer.n_done), Solo())
        assert left_F is not None
        drawn = torch.rand(128, generator=keyed_generator(0, "temporal_mask", step), dtype=torch.float64)
        assert torch.equal(left_F, drawn >= mask.masked_F)
        total += ~left_F
    assert torch.equal(torch.get_rng_state(), before)
    spread = (mask.masked_F * (1 - mask.masked_F) / 400).sqrt()
    assert bool(((total / 400 - mask.masked_F).abs() <= 4.5 * spread).all())


@pytest.mark.parametrize("dense_from", [1, 10**9], ids=["sparse", "dense"])
def test_a_masked_feature_has_no_part_in_the_step_and_is_counted_all_the_same(
    rows: Path, dense_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalised, "DENSE_FROM", dense_from)
    trainer = trainer_of(rows, *AT_ONCE)
    learn(trainer, 3)
    mask, dictionary = mask_of(trainer), trainer.learners[0].dictionary
    mask.masked_F = (torch.arange(128) % 2).double()  # every other one surely
    out = mask.masked_F.bool()
    price = float(mask.price.now(trainer.learners[0].step_info(trainer.n_done))) / world.N
    x, code, decoded, penalty = encoded(trainer)
    assert type(code) is (SparseCode if dense_from == 1 else DenseCode)
    errors, loss = reconstruct(dictionary, x, decoded, sizes=(128,), n_tokens=world.N, ranks=Solo())
    code_NF = (x @ dictionary.W_enc.t() + dictionary.b_enc).relu().detach()
    torch.testing.assert_close(dense(code).detach(), code_NF)  # what fires, and L0, are of all features
    torch.testing.assert_close(x - errors.error, code_NF[:, ~out] @ dictionary.W_dec[~out] + dictionary.b_dec)
    assert float(penalty.detach()) == pytest.approx(price * float(code_NF[:, ~out].sum()), rel=1e-9)
    (loss + penalty).backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        gradient = getattr(dictionary, name).grad
        assert not bool(gradient[out].any()), name
        assert bool(gradient[~out].any()), name


def test_what_is_masked_gains_importance_all_the_same(rows: Path) -> None:
    trainer = trainer_of(rows, *AT_ONCE, "sparsifier.half_life=1")  # the last step is all that counts
    learn(trainer, 5)
    mask, before = mask_of(trainer), mask_of(trainer).averages_F3.clone()
    best = int(before.clamp(min=0).prod(1).argmax())
    mask.averages_F3[best] = 0
    mask.masked_F[best] = 1.0
    learn(trainer, 1)
    assert mask._left_F is not None
    assert not bool(mask._left_F[best])
    assert bool((mask.averages_F3[best] > 0.2 * before[best]).all())
    assert float(mask.masked_F[best]) == 0  # back at once


@pytest.mark.parametrize("after", [8, 20], ids=["in warm-up", "in the ramp"])
def test_a_resumed_run_is_bitwise_the_same(rows: Path, tmp_path: Path, after: int) -> None:
    typed = ["sparsifier.warmup=0.2", "sparsifier.ramp=0.3", "sparsifier.half_life=500"]
    first = trainer_of(rows, *typed, precision="float32")
    learn(first, after)
    assert (mask_of(first)._left_F is None) == (after == 8)
    own = first.learners[0].state().features
    assert len(own["sparsifier/averages"]) == len(own["sparsifier/masked"]) == 128
    second = trainer_of(rows, *typed, precision="float32")
    world.hand_over(first, second, tmp_path)
    for trainer in (first, second):
        learn(trainer, 60 - after)
    for name, value in world.weights(first).items():
        assert torch.equal(value, world.weights(second)[name]), name
    same = second.learners[0].state().features
    for name, value in first.learners[0].state().features.items():
        assert torch.equal(value, same[name]), name


@pytest.mark.parametrize("export_mask", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_exported_sae_fires_k_with_the_mask_or_without(rows: Path, export_mask: bool) -> None:
    typed = ["sparsifier.strength=3", f"sparsifier.export_mask={str(export_mask).lower()}"]
    trainer = trainer_of(rows, *typed, steps=300, precision="float32")
    learn(trainer, 260)
    trainer.rows()[0]
    learn(trainer, 40)
    l0 = trainer.rows()[0]["train/l0"]
    never = mask_of(trainer).masked_F > 0.5
    assert 5 < int(never.sum()) < 100
    sae, figures = only_export(trainer)
    assert list(figures["correction"]) == ["threshold"]
    three_errors = 3 * math.sqrt(2 / (150 * 5))  # some 150 rows in each half, and firings that are Poisson
    assert abs(figures["l0"] / 5 - 1) < three_errors
    assert sae.inference == "threshold"
    assert torch.equal(sae.threshold.isinf(), never if export_mask else torch.zeros_like(never))
    assert len(set(sae.threshold.tolist())) == 1 + export_mask
    if not export_mask:
        assert abs(l0 / 5 - 1) < 0.1


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("sparsifier.deviations=-1", "must not be negative"),
        ("sparsifier.strength=0", "must be positive"),
        ("sparsifier.half_life=0", "must be 1 to 1e15"),
        ("sparsifier.warmup=2", "a share of the tokens"),
        ("sparsifier.ramp=-0.1", "a share of the tokens"),
        ("sparsifier.warmup=0.95", "together longer than the run"),
        ("sparsifier.warmup=1 sparsifier.ramp=0", "no feature would ever be left out"),
        ("sparsifier.export_mask=true sparsifier.strength=0.6", "Give a strength above 0.693, or remove it"),
        ("sparsifier.norms=unit", "temporal_mask has no 'norms'"),
        ("budget=zipf", "only feature_choice"),
        ("aux_loss=aux_k", "Choose aux_loss=none\\."),
        ("aux_loss=aux_zipf", "in the very steps that leave them out. Choose aux_loss=none"),
        ("sparsifier.half_life=100000000000000000000000", "must be 1 to 1e15"),
    ],
)
def test_what_means_nothing_is_refused(typed: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_config(["sparsifier=temporal_mask", *typed.split()])
