"""Every sparsifier learns among all others what it learns alone, bit for bit, and saves and loads the same."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_train.config import SaeConfig
from sae_train.config.sparsifier_registry import SPARSIFIERS
from sae_train.harvest.build import build_stream, check_stream
from sae_train.ranks.interface import Solo
from sae_train.training import restore
from sae_train.training.checkpoint import begin
from sae_train.training.run import plan_of
from sae_train.training.trainer import Trainer, build_trainer
from tools import grid_world as world
from tools.small_runs import defaults_of

STEPS = 6
PLAIN = [name for name in SPARSIFIERS if not defaults_of(name).reads_gradients]
"""One stream harvests gradients for all SAEs or for none."""
PRECISIONS = ("float32", "bf16")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    world.write_activations(folder)
    return folder


@cache
def sae_of(rows: Path, name: str) -> SaeConfig:
    aux = "none" if name in world.WITHOUT_AUX_K else "aux_k"
    width = 64 + 32 * PLAIN.index(name)  # widths differ, so that memory that SAEs share is cut differently
    return world.config_of(rows, [f"sparsifier={name}", f"aux_loss={aux}"], precision="float32", n_features=width).sae


def build(rows: Path, names: list[str], precision: str) -> Trainer:
    config = world.config_of(rows, [], precision=precision, steps=STEPS)
    saes = [sae_of(rows, name) for name in names]
    source = config.source_for(saes)
    facts = check_stream(source, n_ranks=1)
    plan = plan_of(config, facts, n_ranks=1, saes=saes)
    stream = build_stream(source, ranks=Solo(), facts=facts)
    stream.start()
    return build_trainer(source, plan, stream=stream, precision=precision, ranks=Solo())


def trained(trainer: Trainer, *, to: int = STEPS) -> Trainer:
    while trainer.n_done < to:
        trainer.step(trainer.stream.batch(trainer.n_done))
    return trainer


def tensors_of(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    """Return the whole state of each SAE by the name of its sparsifier: weights, moments, counters, totals."""
    states = {learner.config.sparsifier.name: learner.state() for learner in trainer.learners}
    return {name: {**state.shared, **state.features} for name, state in states.items()}


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@cache
def together(rows: Path, precision: str) -> dict[str, dict[str, Tensor]]:
    return tensors_of(trained(build(rows, PLAIN, precision)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", PLAIN)
def test_it_learns_among_others_what_it_learns_alone(rows: Path, name: str, precision: str) -> None:
    (alone,) = tensors_of(trained(build(rows, [name], precision))).values()
    check_equal(alone, together(rows, precision)[name])


def test_all_go_on_from_a_checkpoint_bit_for_bit(rows: Path, tmp_path: Path) -> None:
    half = trained(build(rows, PLAIN, "float32"), to=STEPS // 2)
    path = begin(tmp_path, half.contents(), notes=half.notes(), ranks=Solo(), keep=0).publish()
    resumed = build(rows, PLAIN, "float32")
    resumed.restore(restore.load(path))
    for name, state in tensors_of(trained(resumed)).items():
        check_equal(state, together(rows, "float32")[name])


def test_an_sae_that_was_stopped_stays_out_after_a_resume(rows: Path, tmp_path: Path) -> None:
    half = trained(build(rows, PLAIN, "float32"), to=STEPS // 2)
    gone = half.learners[1]
    half.stop({gone.name: "diverged"})
    path = begin(tmp_path, half.contents(), notes=half.notes(), ranks=Solo(), keep=0).publish()
    resumed = build(rows, PLAIN, "float32")
    resumed.restore(restore.load(path))
    assert resumed.stopped == {gone.name: "diverged"}
    for name, state in tensors_of(trained(resumed)).items():
        assert name != gone.config.sparsifier.name
        check_equal(state, together(rows, "float32")[name])
