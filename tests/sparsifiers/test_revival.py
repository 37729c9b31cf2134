"""Silent features: their biases rise while the learning rate decays, until they fire, and nothing else moves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_train.ranks.interface import Solo
from sae_train.sparsifiers import SPARSIFIERS, sparsifier_class
from sae_train.sparsifiers.allocator import Allocator
from sae_train.training.trainer import Trainer
from tools import grid_world as world

BURIED = slice(0, 32)
LONG = 10**6
"""Tokens without firing that make a feature silent in any of these runs."""
ALLOCATORS = sorted(name for name in SPARSIFIERS if issubclass(sparsifier_class(name), Allocator))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    world.write_activations(folder)
    return folder


def trainer_of(rows: Path, *overrides: str, steps: int = 200) -> Trainer:
    config = world.config_of(rows, [*overrides, "aux_loss=none"], precision="float64", steps=steps, n_features=128)
    return world.build(config, Solo())


def learn(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.step(trainer.stream.batch(trainer.n_done))


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.learners[0].dictionary.named_parameters()}


def bury(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.learners[0].dictionary.b_enc[BURIED] = -3.0


@pytest.mark.parametrize("kind", ["mutual_choice", "topk"])
def test_a_silent_bias_rises_by_the_rate_that_is_lost_and_nothing_else_moves(rows: Path, kind: str) -> None:
    with_it, without = (
        trainer_of(rows, f"sparsifier={kind}", f"sparsifier.revival={revival}") for revival in (0.5, 0.0)
    )
    for trainer in (with_it, without):
        bury(trainer)
        trainer.learners[0].firing.since_F.fill_(LONG)
        trainer.n_done = trainer.plan.steps - 2  # deep in the decay
        lost = trainer.learners[0].plan.peak_lr - trainer.learners[0].step_info(trainer.n_done).learning_rate
        assert lost > 0.9 * trainer.learners[0].plan.peak_lr
        learn(trainer, 1)
    silent_F = with_it.learners[0].firing.since_F > LONG
    assert silent_F[BURIED].all()
    assert not silent_F.all()
    after, plain = parameters(with_it), parameters(without)
    rise_F = 0.5 * lost * silent_F.double()
    torch.testing.assert_close(after.pop("b_enc") - plain.pop("b_enc"), rise_F, rtol=1e-9, atol=1e-15)
    assert all(torch.equal(value, plain[name]) for name, value in after.items())


@pytest.mark.parametrize("kind", ALLOCATORS)
def test_buried_features_come_back_as_the_rate_decays(rows: Path, kind: str) -> None:
    trainer = trainer_of(rows, f"sparsifier={kind}", "optimizer.lr=0.05", f"optimizer.decay_tokens={190 * world.N}")
    learn(trainer, 20)
    bury(trainer)
    learn(trainer, 5)
    assert (trainer.learners[0].firing.since_F[BURIED] > 0).all(), "they were not buried"
    fired_F = torch.zeros(128, dtype=torch.bool)
    while trainer.n_done < trainer.plan.steps:
        learn(trainer, 1)
        fired_F |= trainer.learners[0].firing.since_F == 0
    assert fired_F[BURIED].all()


def test_before_decay_nothing_is_done(rows: Path) -> None:
    trainers = [trainer_of(rows, f"sparsifier.revival={revival}") for revival in (1.0, 0.0)]
    for trainer in trainers:
        learn(trainer, 2)
        bury(trainer)
        trainer.learners[0].firing.since_F.fill_(LONG)
        learn(trainer, 2)
    one, other = (parameters(trainer) for trainer in trainers)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_no_bias_rises_after_a_halt(rows: Path) -> None:
    trainer = trainer_of(rows)
    learn(trainer, 2)
    trainer.learners[0].firing.since_F.fill_(LONG)
    trainer.learners[0].nonfinite.flag.fill_(True)
    trainer.n_done = trainer.plan.steps - 4
    before = trainer.learners[0].dictionary.b_enc.detach().clone()
    learn(trainer, 3)
    assert torch.equal(trainer.learners[0].dictionary.b_enc, before)
