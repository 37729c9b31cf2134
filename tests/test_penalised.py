"""Penalised sparsifiers: their papers' gradients, one function with its zeros or without, and L0 that comes to k."""

import math
from pathlib import Path
from typing import Any

import grid_world as world
import pytest
import torch
from conftest import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import CPU
from torch import Tensor

import sae_train
from sae_train.compose import compose_config
from sae_train.errors import ConfigError
from sae_train.ranks import Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.calibration import calibrate
from sae_train.sae.code import DenseCode, SparseCode
from sae_train.sae.moment import Moment
from sae_train.sae.straight_through import jump_relu, step
from sae_train.sparsifiers import penalised
from sae_train.sparsifiers.jumprelu import JumpReLU
from sae_train.sparsifiers.price import Price
from sae_train.training.finish import exported
from sae_train.training.trainer import Trainer

NESTED = ["nesting=matryoshka", "nesting.prefixes=[0.25,0.5,1.0]"]
KINDS = {
    "l0": ["aux_loss=aux_k"],
    "tanh": ["sparsifier.penalty=tanh", "sparsifier.steepness=9", "aux_loss=none"],
    "nested": [*NESTED, "aux_loss=none"],
    "aligned": ["parametrisation=aligned", "aux_loss=aux_zipf"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    world.write_activations(folder)
    return folder


def trainer_of(rows: Path, *overrides: str, steps: int = 60, precision: str = "float64") -> Trainer:
    config = world.config_of(
        rows, ["sparsifier=jumprelu", *overrides], precision=precision, steps=steps, n_features=128
    )
    return world.build(config, Solo())


def learn(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.step(trainer.stream.batch(trainer.n_done))


@settings(deadline=None, max_examples=50)
@given(
    threshold=st.floats(0.01, 0.5),
    bandwidth=st.floats(0.01, 0.3),
    offsets=st.lists(st.floats(-0.4, 0.4), min_size=1, max_size=9),
    grad=st.floats(-2, 2),
)
def test_gradients_are_the_papers_on_both_sides_of_the_threshold(
    threshold: float, bandwidth: float, offsets: list[float], grad: float
) -> None:
    pre = torch.tensor([threshold + o for o in offsets], dtype=torch.float64, requires_grad=True)
    log_threshold = torch.tensor(math.log(threshold), dtype=torch.float64, requires_grad=True)
    t = log_threshold.exp()
    near = [abs(p - float(t.detach())) / bandwidth < 0.5 for p in pre.tolist()]
    fires = [p > float(t.detach()) for p in pre.tolist()]

    value = jump_relu(pre, t.expand_as(pre), bandwidth=bandwidth)
    assert value.tolist() == [p if f else 0.0 for p, f in zip(pre.tolist(), fires, strict=True)]
    of_pre, of_log = torch.autograd.grad(grad * value.sum(), (pre, log_threshold), retain_graph=True)
    assert of_pre.tolist() == [grad * f for f in fires]
    expected = sum(grad * -threshold / bandwidth for n in near if n)
    assert float(of_log) == pytest.approx(threshold * expected, rel=1e-9, abs=1e-12)  # times threshold: the chain rule

    count = step(pre, t.expand_as(pre), bandwidth=bandwidth)
    assert count.tolist() == [float(f) for f in fires]
    of_pre_, of_log_ = torch.autograd.grad(grad * count.sum(), (pre, log_threshold), allow_unused=True)
    assert of_pre_ is None
    assert float(of_log_) == pytest.approx(threshold * sum(-grad / bandwidth for n in near if n), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty_alone", [False, True])
def test_with_its_zeros_or_without_is_one_function(
    rows: Path, kind: str, penalty_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[type, tuple[dict[str, Tensor], Tensor, Any]] = {}
    for dense_from, expected in ((1, SparseCode), (10**9, DenseCode)):
        monkeypatch.setattr(penalised, "DENSE_FROM", dense_from)
        trainer = trainer_of(rows, "sparsifier.threshold=0.05", "sparsifier.bandwidth=0.08", *KINDS[kind])
        batch = trainer.stream.batch(0)
        dictionary = trainer.dictionary
        pre = dictionary.pre_activations(batch, precision="float64")
        code, penalty = trainer.sparsifier.encode(
            dictionary, batch, pre, moment=trainer.moment(), firing=trainer.firing, ranks=Solo()
        )
        assert type(code) is expected
        assert penalty is not None
        _, loss = trainer._reconstruct(batch, code)
        (penalty if penalty_alone else loss + penalty).backward()  # type: ignore[no-untyped-call]
        grads = {n: p.grad for n, p in dictionary.named_parameters() if p.grad is not None}
        dense = code.value.detach() if isinstance(code, DenseCode) else code.dense().detach()
        found[expected] = grads, dense, (code.l0().tolist(), code.firing_counts().tolist(), float(penalty.detach()))
    (sparse_grads, sparse, said), (dense_grads, dense, said_too) = found[SparseCode], found[DenseCode]
    assert torch.equal(sparse, dense)
    assert 0 < int((sparse > 0).sum()) < sparse.numel() / 2
    assert said[:2] == said_too[:2]
    assert said[2] == pytest.approx(said_too[2], rel=1e-12)
    for name, gradient in dense_grads.items():
        torch.testing.assert_close(sparse_grads.get(name, torch.zeros_like(gradient)), gradient, rtol=1e-9, atol=1e-13)
    assert bool(dense_grads["log_threshold"].any())


def test_the_run_does_not_depend_on_when_zeros_are_left_out(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for dense_from in (1, 16, 10**9):
        monkeypatch.setattr(penalised, "DENSE_FROM", dense_from)
        trainer = trainer_of(rows, "sparsifier.threshold=0.001", "aux_loss=aux_k")
        learn(trainer, 40)
        weights.append(world.weights(trainer))
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert world_close(value, other[name]), name


def world_close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-9 * float(a.abs().max())


def test_no_feature_above_its_threshold_is_a_step_like_any_other(rows: Path) -> None:
    trainer = trainer_of(rows, "sparsifier.threshold=50")
    learn(trainer, 3)
    assert all(bool(p.isfinite().all()) for p in trainer.dictionary.parameters())
    assert bool((trainer.dictionary.log_threshold < math.log(50) - 0.5).all())  # they come down


@pytest.mark.parametrize("start", [0.001, 0.03, 5.0])
def test_l0_comes_to_k_from_above_and_below_and_stays(rows: Path, start: float) -> None:
    trainer = trainer_of(rows, f"sparsifier.threshold={start}", steps=600, precision="float32")
    l0 = []
    for _ in range(trainer.plan.steps):
        learn(trainer, 1)
        if trainer.n_done % 50 == 0:
            l0.append(trainer.row()["train/l0"])
    assert all(abs(value / 5 - 1) < 0.1 for value in l0[3:]), l0
    _, figures = exported(trainer, between=lambda: None)
    assert figures["threshold_factor"] != 1.0
    assert abs(figures["l0"] / 5 - 1) < 0.1  # of some 150 held-out rows


class Plant:
    """A dictionary in a nutshell: L0 falls with the thresholds, which the price moves as fast as the rate allows."""

    def __init__(self, *, slope: float, right_price: float) -> None:
        self.slope, self.right, self.log_threshold = slope, math.log(right_price), 0.0

    def step(self, price: Price, *, lr: float) -> Tensor:
        self.log_threshold += float(price.nudge)
        l0 = torch.tensor(200 * math.exp(-self.slope * self.log_threshold))
        self.log_threshold += lr * math.tanh(math.log(float(price.now())) - self.right)
        return l0


@settings(deadline=None, max_examples=20)
@given(slope=st.floats(0.5, 3), right_price=st.floats(1e-5, 1e-2))
def test_the_price_holds_l0_through_a_change_of_learning_rate(slope: float, right_price: float) -> None:
    price, plant, total = Price(settle=0.1, device=CPU), Plant(slope=slope, right_price=right_price), 4000
    found = []
    for number in range(total):
        lr = 3e-3 if number < total // 2 else 3e-4
        l0 = plant.step(price, lr=lr)
        moment = Moment(step=number, tokens=number, total_tokens=total, batch_tokens=1, learning_rate=lr, seed=0)
        price.look(l0, k=32, moment=moment)
        found.append(float(l0))
        if number == total // 3:  # a resumed run
            again = Price(settle=0.1, device=CPU)
            again.load_state(price.state())
            price = again
    assert all(abs(l0 / 32 - 1) < 0.05 for l0 in found[total // 5 :])
    assert abs(math.log(float(price.now()) / right_price)) < 1


def test_a_resumed_run_is_bitwise_the_same(rows: Path) -> None:
    first = trainer_of(rows, precision="float32")
    learn(first, 25)
    state, own = first.state(), first.feature_state()
    lanes = first.stream.lane_states()
    state, own = ({k: v.clone() for k, v in part.items()} for part in (state, own))
    second = trainer_of(rows, precision="float32")
    second.load_state(state, own, lambda lane: lanes[lane])
    for trainer in (first, second):
        learn(trainer, 20)
    for (name, one), (_, other) in zip(
        first.dictionary.named_parameters(), second.dictionary.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert torch.equal(first.sparsifier.state()["log_price"], second.sparsifier.state()["log_price"])


@pytest.mark.parametrize(("times", "is_close"), [(1.0, True), (3.0, False)])
def test_one_factor_brings_l0_to_k_unless_it_would_be_another_sae(rows: Path, times: float, is_close: bool) -> None:
    trainer = trainer_of(rows, steps=300, precision="float32")
    learn(trainer, 300)
    sparsifier = trainer.sparsifier
    assert isinstance(sparsifier, JumpReLU)
    scaling = trainer.stream.scaling
    sae = SparseAutoencoder.fold(
        trainer.dictionary, centre_D=scaling.centre_D, scale=scaling.scale, k=5, inference="threshold"
    )
    raw = torch.cat([batch.raw_ND for batch in trainer.stream.held_out.batches("calibration", max_tokens=10**6)])
    learned = times * scaling.scale * sparsifier.thresholds(trainer.dictionary).detach().double()
    found = calibrate(
        sae, raw, sparsifier=sparsifier, moment=trainer.moment(), n_features=128, ranks=Solo(), learned_F=learned
    )
    assert found.factor is not None
    torch.testing.assert_close(found.threshold_F, (found.factor * learned).float())
    sae.threshold.copy_(found.threshold_F)
    fires = int((sae.encode(raw) > 0).sum())
    if is_close:
        assert abs(fires - 5 * len(raw)) <= 2
    else:
        assert found.factor == 1.0
        assert abs(fires / len(raw) / 5 - 1) > 0.1


def test_a_finished_run_says_its_factor_and_loads(rows: Path, tmp_path: Path, command: Command) -> None:
    done = command(
        "harvest=tensors", f"harvest.path={rows}", "harvest.calibration_tokens=512", "tracking=none", "k=8",
        "sparsifier=jumprelu", "n_features=128", "batch_tokens=64", "tokens=25600", "log_every=6400", "name=j",
    )  # fmt: skip
    assert done.status == 0, done.stdout
    sae = sae_train.load(tmp_path / "runs" / "j")
    assert sae.inference == "threshold"
    factor = sae.config["figures"]["threshold_factor"]
    assert 0.5 < factor < 2
    assert bool((sae.threshold > 0).all())
    assert len(set(sae.threshold.tolist())) > 64
    metrics = (tmp_path / "runs" / "j" / "metrics.jsonl").read_text()
    assert "train/coefficient" in metrics


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["sparsifier.penalty=l1"], "Choose l0 or tanh"),
        (["sparsifier.steepness=3"], "never reads it"),
        (["sparsifier.bandwidth=0"], "must be positive"),
        (["sparsifier.threshold=-1"], "must be positive"),
        (["sparsifier.settle=2"], "a share of the tokens"),
        (["budget=zipf"], "only feature_choice"),
    ],
)
def test_what_means_nothing_is_refused(typed: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_config(["sparsifier=jumprelu", *typed])
