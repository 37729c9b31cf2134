"""Whole training steps on torch's meta device, which stands for a GPU.

The meta device has shapes and no values. It raises wherever the host reads a value, which on a GPU would wait for the
device, and wherever an operation mixes tensors of two devices.
"""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch

from sae_train.config import RunConfig
from sae_train.config.sparsifier_registry import SPARSIFIERS
from sae_train.harvest.build import StreamFacts, check_stream
from sae_train.ranks.interface import Solo
from sae_train.sae.step_info import StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers import sparsifier_class
from sae_train.sparsifiers.allocator import Allocator
from sae_train.sparsifiers.base import Encoding
from sae_train.training.batch import RowBatch
from sae_train.training.learner import Learner
from sae_train.training.run import plan_of
from sae_train.training.scratch import Scratch
from tools import grid_world as world

NESTING = {"plain": [], "nested": world.NESTED}
VARIANTS = {
    "topk": [["sparsifier.multi_weight=0.125"]],
    "feature_choice": [["budget=zipf"], ["sparsifier.after=0.5"]],
    "mutual_choice": [["parametrisation=aligned"], ["budget.start_k=9", "budget.anneal=0.5"]],
}
"""Further settings of a sparsifier whose steps run other lines than its default's."""
ALLOCATORS = [name for name in SPARSIFIERS if issubclass(sparsifier_class(name), Allocator)]
CASES = [(name, variant) for name in ALLOCATORS for variant in ([], *VARIANTS.get(name, []))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    world.write_activations(folder)
    return folder


@cache
def parts_of(rows: Path, *case: str) -> RunConfig:
    return world.config_of(rows, list(case), precision="float32")


@cache
def facts_of(rows: Path, *, reads_gradients: bool) -> StreamFacts:
    case = ["sparsifier=gradient" if reads_gradients else "sparsifier=topk"]
    return check_stream(parts_of(rows, *case).source, n_ranks=1)


def learner_of(rows: Path, case: list[str], *, nesting: str, aux: str, precision: str = "float32") -> Learner:
    """Return a learner on the meta device. Its configuration is put together from parts that are composed once."""
    config = dataclasses.replace(
        parts_of(rows, *case),
        nesting=parts_of(rows, *NESTING[nesting]).nesting,
        aux_loss=parts_of(rows, f"aux_loss={aux}").aux_loss,
        precision=precision,
    )
    plan = plan_of(config, facts_of(rows, reads_gradients=config.reads_gradients), n_ranks=1)
    (sae,) = plan.saes.values()
    return Learner(sae, precision=precision, ranks=Solo("meta"), scratch=Scratch())


def batch_of(learner: Learner) -> RowBatch:
    x_ND = torch.empty(world.N, world.D, dtype=learner.dictionary.W_dec.dtype, device="meta")
    gradient_ND = torch.empty_like(x_ND) if learner.config.sparsifier.reads_gradients else None
    norm_N, sum_D = torch.linalg.vector_norm(x_ND, dim=1), x_ND.sum(0, dtype=torch.float64)
    return RowBatch(x_ND=x_ND, gradient_ND=gradient_ND, own=slice(0, world.N), norm_N=norm_N, sum_D=sum_D)


def step_twice(learner: Learner) -> None:
    for step in range(2):
        learner.step(batch_of(learner), step=step)


@pytest.mark.parametrize("aux", ["none", "aux_k", "aux_zipf"])
@pytest.mark.parametrize("nesting", NESTING)
@pytest.mark.parametrize(("name", "variant"), CASES, ids=str)
def test_a_step_reads_no_value_and_mixes_no_devices(
    rows: Path, name: str, variant: list[str], nesting: str, aux: str
) -> None:
    learner = learner_of(rows, [f"sparsifier={name}", *variant], nesting=nesting, aux=aux)
    step_twice(learner)
    assert all(parameter.is_meta for parameter in learner.dictionary.parameters())
    assert all(value.is_meta for value in learner.state().features.values())


@pytest.mark.parametrize("precision", ["bf16", "float64"])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_so_it_is_at_other_precisions(rows: Path, name: str, precision: str) -> None:
    step_twice(learner_of(rows, [f"sparsifier={name}"], nesting="nested", aux="aux_k", precision=precision))


def test_the_meta_device_refuses_what_a_gpu_would_wait_for(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(rows, ["sparsifier=mutual_choice"], nesting="plain", aux="none")
    encode = learner.sparsifier.encode

    def reads_a_value(sae: TrainableAutoencoder, inputs: StepInputs) -> Encoding:
        encoding = encode(sae, inputs)
        assert int(encoding.code.l0().sum()) >= 0
        return encoding

    monkeypatch.setattr(learner.sparsifier, "encode", reads_a_value)
    with pytest.raises(RuntimeError, match="meta"):
        step_twice(learner)


def test_the_meta_device_refuses_a_tensor_of_the_host(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(rows, ["sparsifier=mutual_choice"], nesting="plain", aux="none")
    monkeypatch.setattr(learner.firing, "since_F", learner.firing.since_F.new_zeros(world.F, device="cpu"))
    with pytest.raises(RuntimeError, match="device"):
        step_twice(learner)
