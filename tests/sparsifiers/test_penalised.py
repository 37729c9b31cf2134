"""Penalised sparsifiers: their papers' gradients, one function with its zeros or without, and L0 that comes to k."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sae_train
from sae_train.cli.compose import compose_config
from sae_train.errors import ConfigError
from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.calibration import calibrate
from sae_train.sae.code import DenseCode, SparseCode
from sae_train.sae.step_info import StepInfo
from sae_train.sparsifiers import SPARSIFIERS, penalised, sparsifier_class
from sae_train.sparsifiers.gated import Gated
from sae_train.sparsifiers.jumprelu import JumpReLU
from sae_train.sparsifiers.l1 import PAnneal, ReLU
from sae_train.sparsifiers.price import Price
from sae_train.sparsifiers.straight_through import jump_relu, step
from sae_train.training.trainer import Trainer
from tools import grid_world as world
from tools.command_line import Command
from tools.one_of_each import only, only_export
from tools.sae_parts import encoded, inputs_of
from tools.small_runs import CPU

NESTED = ["nesting=matryoshka", "nesting.prefixes=[0.25,0.5,1.0]"]
WIDE = ["sparsifier=jumprelu", "sparsifier.threshold=0.05", "sparsifier.bandwidth=0.08"]
KINDS = {
    "jumprelu": [*WIDE, "aux_loss=aux_k"],
    "jumprelu, tanh": [*WIDE, "sparsifier.penalty=tanh", "sparsifier.steepness=9", "aux_loss=none"],
    "jumprelu, nested": [*WIDE, *NESTED, "aux_loss=none"],
    "jumprelu, aligned": [*WIDE, "parametrisation=aligned", "aux_loss=aux_zipf"],
    "gated": ["sparsifier=gated"],
    "gated, nested": ["sparsifier=gated", *NESTED, "aux_loss=none"],
    "relu": ["sparsifier=relu", "aux_loss=aux_zipf"],
    "relu, unit norms": ["sparsifier=relu", "sparsifier.norms=unit", "parametrisation=aligned"],
    "p_anneal": ["sparsifier=p_anneal"],
}
PENALISED = [name for name in SPARSIFIERS if issubclass(sparsifier_class(name), penalised.Penalised)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    world.write_activations(folder)
    return folder


def trainer_of(rows: Path, *overrides: str, steps: int = 60, precision: str = "float64") -> Trainer:
    config = world.config_of(rows, list(overrides), precision=precision, steps=steps, n_features=128)
    return world.build(config, Solo())


def shake(trainer: Trainer) -> None:
    """Move what begins at zero, so that its gradient is not hidden."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.learners[0].dictionary.named_parameters():
            if name in ("b_enc", "b_dec", "log_magnitude", "b_magnitude", "W_free"):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


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
        trainer = trainer_of(rows, *KINDS[kind])
        shake(trainer)
        batch = only(trainer.stream.batch(0)).x_ND
        dictionary = trainer.learners[0].dictionary
        code, decoded, penalty = encoded(trainer, batch)
        assert decoded is code
        assert type(code) is expected
        assert penalty is not None
        _, loss = trainer.learners[0].reconstruct(batch, code)
        (penalty if penalty_alone else loss + penalty).backward()
        grads = {n: p.grad for n, p in dictionary.named_parameters() if p.grad is not None}
        dense = code.value.detach() if isinstance(code, DenseCode) else code.dense().detach()
        found[expected] = grads, dense, (code.l0().tolist(), code.firing_counts().tolist(), float(penalty.detach()))
    (sparse_grads, sparse, said), (dense_grads, dense, said_too) = found[SparseCode], found[DenseCode]
    assert torch.equal(sparse, dense)
    assert 0 < int((sparse > 0).sum()) < 0.8 * sparse.numel()
    assert said[:2] == said_too[:2]
    assert said[2] == pytest.approx(said_too[2], rel=1e-12)
    for name, gradient in dense_grads.items():
        torch.testing.assert_close(sparse_grads.get(name, torch.zeros_like(gradient)), gradient, rtol=1e-9, atol=1e-13)
    if kind.startswith("jumprelu"):
        assert bool(dense_grads["log_threshold"].any())


def test_the_run_does_not_depend_on_when_zeros_are_left_out(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for dense_from in (1, 16, 10**9):
        monkeypatch.setattr(penalised, "DENSE_FROM", dense_from)
        trainer = trainer_of(rows, "sparsifier=jumprelu", "sparsifier.threshold=0.001", "aux_loss=aux_k")
        learn(trainer, 40)
        weights.append(world.weights(trainer))
    for other in weights[1:]:
        for name, value in weights[0].items():
            assert world_close(value, other[name]), name


def world_close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-9 * float(a.abs().max())


def test_nothing_moves_after_a_halt(rows: Path) -> None:
    trainer = trainer_of(rows, "sparsifier=jumprelu", "sparsifier.threshold=5")
    learn(trainer, 2)
    assert float(trainer.learners[0].sparsifier.state().shared["nudge"]) != 0
    before = {name: p.detach().clone() for name, p in trainer.learners[0].dictionary.named_parameters()}
    for halted in (True, False):
        trainer.learners[0].sparsifier.before_step(trainer.learners[0].dictionary, halted=torch.tensor(halted))
        same = [torch.equal(p, before[name]) for name, p in trainer.learners[0].dictionary.named_parameters()]
        assert all(same) == halted


@pytest.mark.parametrize("far", [-300.0, 300.0])
def test_price_and_thresholds_stay_finite_where_l0_cannot_be_reached(rows: Path, far: float) -> None:
    trainer = trainer_of(rows, "sparsifier=jumprelu", precision="float32")
    jump = trainer.learners[0].sparsifier
    assert isinstance(jump, JumpReLU)
    with torch.no_grad():
        jump.nudge(trainer.learners[0].dictionary, torch.tensor(far))
    threshold_F = jump.thresholds(trainer.learners[0].dictionary)
    assert bool((threshold_F.isfinite() & (threshold_F > 0)).all())
    price = Price(3e-4, settle=0.0, device=CPU)
    for number in range(3000):
        when = StepInfo(step=number, tokens=number, total_tokens=3000, batch_tokens=1, learning_rate=1.0, seed=0)
        price.update(torch.tensor(1e-9 if far < 0 else 1e9), size=torch.ones(()), k=32, info=when)
    assert 0 < float(price.now(when)) < math.inf


def test_no_feature_above_its_threshold_is_a_step_like_any_other(rows: Path) -> None:
    trainer = trainer_of(rows, "sparsifier=jumprelu", "sparsifier.threshold=9")
    learn(trainer, 3)
    assert trainer.rows()[0]["train/l0"] == 0
    assert all(bool(p.isfinite().all()) for p in trainer.learners[0].dictionary.parameters())
    assert bool(
        (trainer.learners[0].dictionary.get_parameter("log_threshold") < math.log(9) - 0.5).all()
    )  # they come down


@pytest.mark.parametrize(
    "typed",
    [["sparsifier=jumprelu", "sparsifier.threshold=5"], ["sparsifier=p_anneal"]]
    + [
        pytest.param(typed, marks=pytest.mark.slow)
        for typed in (
            ["sparsifier=jumprelu", "sparsifier.threshold=0.001"],
            ["sparsifier=jumprelu", "sparsifier.threshold=0.03"],
            ["sparsifier=gated"],
            ["sparsifier=relu"],
        )
    ],
    ids=" ".join,
)
def test_l0_comes_to_k_from_above_and_below_and_stays(rows: Path, typed: list[str]) -> None:
    trainer = trainer_of(rows, *typed, f"harvest.held_out={rows}", steps=600, precision="float32")
    l0 = []
    for _ in range(trainer.plan.steps):
        learn(trainer, 1)
        if trainer.n_done % 50 == 0:
            l0.append(trainer.rows()[0]["train/l0"])
    assert all(abs(value / 5 - 1) < 0.1 for value in l0[3:]), l0
    _, figures = only_export(trainer)
    assert figures["correction"] != {}
    assert abs(figures["l0"] / 5 - 1) < 0.05  # of some 3000 rows, calibrated on as many others


class Plant:
    """A dictionary in a nutshell: L0 falls with the thresholds, which the price moves as fast as the rate allows."""

    def __init__(self, *, slope: float, right_price: float) -> None:
        self.slope, self.right, self.log_threshold = slope, math.log(right_price), 0.0

    def step(self, price: Price, info: StepInfo) -> Tensor:
        self.log_threshold += float(price.nudge)
        l0 = torch.tensor(200 * math.exp(-self.slope * self.log_threshold))
        self.log_threshold += info.learning_rate * math.tanh(math.log(float(price.now(info))) - self.right)
        return l0


@settings(deadline=None, max_examples=20)
@given(slope=st.floats(0.5, 3), right_price=st.floats(1e-5, 1e-2))
def test_the_price_holds_l0_through_a_change_of_learning_rate(slope: float, right_price: float) -> None:
    price, plant, total = Price(3e-4, settle=0.1, device=CPU), Plant(slope=slope, right_price=right_price), 4000
    found = []
    for number in range(total):
        lr = 3e-3 if number < total // 2 else 3e-4
        info = StepInfo(step=number, tokens=number, total_tokens=total, batch_tokens=1, learning_rate=lr, seed=0)
        l0 = plant.step(price, info)
        price.update(l0, size=torch.ones(()), k=32, info=info)
        found.append(float(l0))
        if number == total // 3:  # a resumed run
            again = Price(3e-4, settle=0.1, device=CPU)
            again.load_state(price.state())
            price = again
    assert all(abs(l0 / 32 - 1) < 0.05 for l0 in found[total // 5 :])
    assert abs(math.log(float(price.now(info)) / right_price)) < 1


@pytest.mark.parametrize("name", PENALISED)
def test_a_resumed_run_is_bitwise_the_same(rows: Path, tmp_path: Path, name: str) -> None:
    first = trainer_of(rows, f"sparsifier={name}", precision="float32")
    learn(first, 25)
    second = trainer_of(rows, f"sparsifier={name}", precision="float32")
    world.hand_over(first, second, tmp_path)
    for trainer in (first, second):
        learn(trainer, 20)
    for kind in ("shared", "features"):
        own, same = (getattr(each.learners[0].state(), kind) for each in (first, second))
        for key, value in own.items():
            assert torch.equal(value, same[key]), key


def test_a_gated_feature_is_exported_as_the_jumprelu_feature_that_it_is(rows: Path) -> None:
    trainer = trainer_of(rows, "sparsifier=gated")
    shake(trainer)
    learn(trainer, 30)
    gated, dictionary, scaling = (
        trainer.learners[0].sparsifier,
        trainer.learners[0].dictionary,
        only(trainer.stream.scalings),
    )
    x = only(trainer.stream.batch(30)).x_ND
    code = encoded(trainer, x).code
    trained = code.value if isinstance(code, DenseCode) else code.dense()
    rule = gated.export(dictionary, trainer.learners[0].step_info(trainer.n_done))
    W_enc, b_enc, learned = rule.W_enc, rule.b_enc, rule.threshold_F
    magnitude = x @ W_enc.t() + b_enc
    assert learned is not None
    assert bool((learned > 0).any())
    assert bool((learned == 0).any())
    torch.testing.assert_close(torch.where(magnitude > learned, magnitude, 0), trained.detach())
    sae = SparseAutoencoder.fold(
        dictionary, centre_D=scaling.centre_D, scale=scaling.scale, k=5, inference="threshold", encoder=(W_enc, b_enc)
    )
    sae.threshold.copy_(learned * scaling.scale)
    raw = x * scaling.scale + scaling.centre_D
    torch.testing.assert_close(
        sae.encode(raw.float()).double(), trained.detach() * scaling.scale, rtol=1e-3, atol=1e-4 * scaling.scale
    )


def test_a_gates_own_reconstruction_trains_no_decoder(rows: Path) -> None:
    trainer = trainer_of(rows, "sparsifier=gated")
    dictionary, x = trainer.learners[0].dictionary, only(trainer.stream.batch(0)).x_ND
    gated = trainer.learners[0].sparsifier
    assert isinstance(gated, Gated)
    pre = DenseCode(value=dictionary.attach_dense(x, dictionary.pre_activations(x)))
    loss = gated.values(dictionary, pre, inputs_of(trainer, x)).extra_loss
    assert loss is not None
    x_hat = pre.value.relu() @ dictionary.W_dec + dictionary.b_dec
    torch.testing.assert_close(loss, (x - x_hat).square().sum() / len(x))
    loss.backward()
    assert dictionary.W_dec.grad is None
    assert dictionary.b_dec.grad is None
    assert bool(dictionary.W_enc.grad.any())


def test_p_falls_in_equal_steps_and_the_penalty_stays(rows: Path) -> None:
    trainer = trainer_of(rows, "sparsifier=p_anneal", "sparsifier.start=0.2", "sparsifier.changes=4", steps=100)
    sparsifier = trainer.learners[0].sparsifier
    assert isinstance(sparsifier, PAnneal)
    p = [sparsifier.p_at(tokens, 100) for tokens in range(100)]
    assert p[:20] == [1.0] * 20
    assert [p[n] for n in (20, 40, 60, 80, 99)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2])
    value = torch.rand(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.3
    priced = []
    for number in (19, 20, 21, 40, 41):
        when = StepInfo(step=number, tokens=number * 64, total_tokens=6400, batch_tokens=64, learning_rate=1e-3, seed=0)
        code = DenseCode(value=value.clone().requires_grad_())
        inputs = dataclasses.replace(inputs_of(trainer, only(trainer.stream.batch(0)).x_ND), info=when)
        one = sparsifier.values(trainer.learners[0].dictionary, code, inputs).priced
        one.backward()
        assert code.value.grad is not None
        assert bool(code.value.grad.isfinite().all())
        assert not bool(code.value.grad[value <= 0].any())
        priced.append(float(one.detach()))
    assert priced == pytest.approx([priced[0]] * 5, rel=1e-9)  # of the same values, before and after p has changed


@pytest.mark.parametrize("norms", ["free", "unit"])
def test_l1_weighs_values_with_their_rows_norms(rows: Path, norms: str) -> None:
    trainer = trainer_of(rows, "sparsifier=relu", f"sparsifier.norms={norms}", steps=80)
    learn(trainer, 60)
    dictionary, x = trainer.learners[0].dictionary, only(trainer.stream.batch(60)).x_ND
    norm_F = dictionary.W_dec.norm(dim=1)
    ones = torch.ones_like(norm_F)
    assert bool((norm_F - 1).abs().max() > 0.01) == (norms == "free")
    pre = DenseCode(value=dictionary.pre_activations(x))
    relu = trainer.learners[0].sparsifier
    assert isinstance(relu, ReLU)
    value, priced, *_ = relu.values(dictionary, pre, inputs_of(trainer, x))
    torch.testing.assert_close(priced, (pre.value.relu() * (norm_F if norms == "free" else ones)).sum())
    sae, _ = only_export(trainer)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), ones.float())
    scaling = only(trainer.stream.scalings)
    sae.threshold.zero_()
    raw = (x * scaling.scale + scaling.centre_D).float()
    expected = (value @ dictionary.W_dec + dictionary.b_dec) * scaling.scale + scaling.centre_D
    torch.testing.assert_close(sae(raw).double(), expected, rtol=1e-3, atol=1e-3 * float(scaling.scale))


@pytest.mark.parametrize(("times", "is_close"), [(1.0, True), (3.0, False)])
def test_one_factor_brings_l0_to_k_unless_it_would_be_another_sae(rows: Path, times: float, is_close: bool) -> None:
    trainer = trainer_of(rows, "sparsifier=jumprelu", steps=300, precision="float32")
    learn(trainer, 300)
    sparsifier = trainer.learners[0].sparsifier
    assert isinstance(sparsifier, JumpReLU)
    scaling = only(trainer.stream.scalings)
    sae = SparseAutoencoder.fold(
        trainer.learners[0].dictionary, centre_D=scaling.centre_D, scale=scaling.scale, k=5, inference="threshold"
    )
    batches = trainer.stream.held_out.batches("calibration", max_tokens=10**6, ranks=Solo())
    raw = torch.cat([only(batch.sites).raw_ND for batch in batches])
    learned = times * scaling.scale * sparsifier.thresholds(trainer.learners[0].dictionary).detach().double()
    found = calibrate(sae, raw, k=5, batch_tokens=world.N, n_features=128, ranks=Solo(), learned_F=learned)
    assert found.correction is not None
    factor = found.correction.get("factor", 1.0)
    torch.testing.assert_close(found.threshold_F, (factor * learned).float())
    sae.threshold.copy_(found.threshold_F)
    fires = int((sae.encode(raw) > 0).sum())
    if is_close:
        assert abs(fires - 5 * len(raw)) <= 2
    else:
        assert found.correction == {}
        assert abs(fires / len(raw) / 5 - 1) > 0.1


def small_sae(learned: list[float]) -> tuple[SparseAutoencoder, Tensor, Tensor]:
    """Return an autoencoder of as many features as thresholds, that reads its affinities off the activations."""
    eye = torch.eye(len(learned))
    zeros = torch.zeros(len(learned))
    sae = SparseAutoencoder(
        W_enc=eye, b_enc=zeros, W_dec=eye, b_dec=zeros, threshold=zeros.clone(), k=1.0, inference="threshold"
    )
    rows = torch.rand(400, len(learned), generator=torch.Generator().manual_seed(1)) - 0.25
    return sae.eval(), rows, torch.tensor(learned, dtype=torch.float64)


@pytest.mark.parametrize(
    ("learned", "k", "said"),
    [
        ([0.5, 0.6, 0.4, 0.5], 1.0, "factor"),
        ([0.0, 0.0, 0.7, 0.74], 1.45, ""),  # those without a threshold alone fire more often than k
        ([1e-6, 1e-6, 1e-6, 1e-6], 3.2, "factor"),  # fewer are positive than k
        ([0.0, 0.0, 0.0, 0.0], 2.9, "threshold"),
        ([0.0, 0.0, 0.0, 0.0], 3.2, "threshold"),
    ],
)
def test_a_correction_meets_its_target_or_is_none(learned: list[float], k: float, said: str) -> None:
    sae, rows, learned_F = small_sae(learned)
    found = calibrate(sae, rows, k=k, batch_tokens=10, n_features=4, ranks=Solo(), learned_F=learned_F)
    assert list(found.correction or {}) == ([said] if said else [])
    assert bool(found.threshold_F.isfinite().all())
    sae.threshold.copy_(found.threshold_F)
    l0 = float((sae.encode(rows) > 0).sum()) / len(rows)
    if said:
        assert abs(l0 - found.target_l0) <= 2 / len(rows)
        assert found.target_l0 == pytest.approx(k * found.used_share)
    else:
        assert torch.equal(found.threshold_F, learned_F.float())
    assert (found.used_share < 1) == (k == 3.2)


@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.parametrize("steps", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_l0_comes_to_k_in_few_steps_and_at_a_small_rate(rows: Path, name: str, steps: int) -> None:
    trainer = trainer_of(rows, f"sparsifier={name}", "optimizer.lr=0.0013", steps=steps, precision="float32")
    learn(trainer, steps - steps // 10)
    trainer.rows()[0]
    learn(trainer, steps // 10)
    assert abs(trainer.rows()[0]["train/l0"] / 5 - 1) < 0.1


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "relu"])
def test_what_dead_features_lack_to_fire_is_learned(rows: Path, kind: str) -> None:
    trainer = trainer_of(rows, *KINDS[kind])
    shake(trainer)
    dictionary, x, sparsifier = (
        trainer.learners[0].dictionary,
        only(trainer.stream.batch(0)).x_ND,
        trainer.learners[0].sparsifier,
    )
    assert isinstance(sparsifier, penalised.Penalised)
    trainer.learners[0].firing.since_F[:40] = trainer.learners[0].plan.dead_window
    inputs = inputs_of(trainer, x)
    inputs = dataclasses.replace(inputs, info=dataclasses.replace(inputs.info, batch_tokens=2 * len(x)))
    pre, loss = inputs.pre_NF, sparsifier._revival(dictionary, inputs)
    lacks = (dictionary.get_parameter("log_threshold").exp() if kind == "jumprelu" else 0) - pre
    torch.testing.assert_close(loss, 1e-3 * lacks[:, :40].sum() / (2 * len(x)))
    loss.backward()
    learned = [dictionary.W_enc, dictionary.b_enc] + (
        [dictionary.get_parameter("log_threshold")] if kind == "jumprelu" else []
    )
    for parameter in learned:
        assert parameter.grad is not None
        assert bool(parameter.grad[:40].any())
        assert not bool(parameter.grad[40:].any())


def test_a_run_that_ends_far_from_k_is_exported_as_it_is_and_says_so(
    rows: Path, tmp_path: Path, command: Command
) -> None:
    done = command(
        "harvest=tensors", f"harvest.path={rows}", "harvest.calibration_tokens=512", "tracking=none", "k=2",
        "sparsifier=relu", "n_features=128", "batch_tokens=64", "tokens=256", "log_every=64", "name=far",
    )  # fmt: skip
    assert done.status == 0, done.stdout
    assert "(target 2, missed: thresholds are exported as training left them)" in done.stdout
    sae = sae_train.load(tmp_path / "runs" / "far")
    assert sae.config["figures"]["correction"] == {}
    assert not bool(sae.threshold.any())


def test_a_finished_run_says_its_factor_and_loads(rows: Path, tmp_path: Path, command: Command) -> None:
    done = command(
        "harvest=tensors", f"harvest.path={rows}", "harvest.calibration_tokens=512", "tracking=none", "k=8",
        "sparsifier=jumprelu", "n_features=128", "batch_tokens=64", "tokens=25600", "log_every=6400", "name=j",
    )  # fmt: skip
    assert done.status == 0, done.stdout
    sae = sae_train.load(tmp_path / "runs" / "j")
    assert sae.inference == "threshold"
    factor = sae.config["figures"]["correction"]["factor"]
    assert 0.5 < factor < 2
    assert bool((sae.threshold > 0).all())
    assert len(set(sae.threshold.tolist())) > 64
    metrics = (tmp_path / "runs" / "j" / "metrics.jsonl").read_text()
    assert "train/coefficient" in metrics


@pytest.mark.parametrize("name", PENALISED)
def test_a_coefficient_takes_the_place_of_k(name: str) -> None:
    config = compose_config([f"sparsifier={name}", "sparsifier.coefficient=0.001"])
    assert config.k is None
    assert config.sparsity == "coefficient 0.001"
    for typed, said in (
        ("k=8", "k=8 and sparsifier.coefficient=0.001: the one follows from the other"),
        ("aux_loss=aux_zipf", "aux_loss=aux_zipf: its law is of densities that sum to k"),
        ("budget.start_k=9", "budget.start_k=9: sparsifier.coefficient leads to no k"),
        ("sparsifier.coefficient=0", "given 2 times"),
    ):
        with pytest.raises(ConfigError, match=said):
            compose_config([f"sparsifier={name}", "sparsifier.coefficient=0.001", typed])
    with pytest.raises(ConfigError, match=f"k=null: sparsifier={name} needs a k"):
        compose_config([f"sparsifier={name}", "k=null"])
    with pytest.raises(ConfigError, match="must be positive"):
        compose_config([f"sparsifier={name}", "sparsifier.coefficient=-1"])


def test_a_fixed_price_rises_to_what_was_typed_and_nothing_is_steered(rows: Path) -> None:
    config = world.config_of(rows, [], precision="float64", steps=40, n_features=128)
    assert config.k is not None
    overrides = ["harvest=tensors", f"harvest.path={rows}", "harvest.calibration_tokens=512", "tracking=none"]
    overrides += ["n_features=128", "batch_tokens=64", f"tokens={64 * 40}", "precision=float64"]
    trainer = world.build(
        compose_config([*overrides, "sparsifier=relu", "sparsifier.coefficient=0.01", "sparsifier.settle=0.5"]), Solo()
    )
    prices = []
    for _ in range(40):
        prices.append(
            trainer.learners[0].sparsifier.figures(trainer.learners[0].step_info(trainer.n_done))["train/coefficient"]
        )
        learn(trainer, 1)
        assert isinstance(trainer.learners[0].sparsifier, ReLU)
        assert float(trainer.learners[0].sparsifier.price.nudge) == 0
    assert prices == pytest.approx([0.01 * min(1, step / 20) for step in range(40)])
    assert "train/budget_used" not in trainer.rows()[0]
    sae, figures = only_export(trainer)
    assert "correction" not in figures
    assert not bool(sae.threshold.any())
    assert sae.k == figures["target_l0"] > 0


@pytest.mark.slow
def test_the_verdict_names_the_coefficient(rows: Path, tmp_path: Path, command: Command) -> None:
    done = command(
        "harvest=tensors", f"harvest.path={rows}", "harvest.calibration_tokens=512", "tracking=none", "log_every=640",
        "sparsifier=jumprelu", "sparsifier.coefficient=0.002", "n_features=128", "batch_tokens=64", "tokens=2560",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert "(coefficient 0.002)" in done.stdout
    (directory,) = (tmp_path / "runs").iterdir()
    assert ".jumprelu.c0.002.f128" in directory.name
    assert sae_train.load(directory).k > 0


@pytest.mark.parametrize(
    ("name", "typed", "said"),
    [
        ("jumprelu", "sparsifier.penalty=l1", "Choose l0 or tanh"),
        ("jumprelu", "sparsifier.steepness=3", "never reads it"),
        ("jumprelu", "sparsifier.bandwidth=0", "must be positive"),
        ("jumprelu", "sparsifier.threshold=-1", "must be above 0 and at most 10"),
        ("jumprelu", "sparsifier.settle=2", "a share of the tokens"),
        ("jumprelu", "budget=zipf", "only feature_choice"),
        ("relu", "sparsifier.norms=none", "Choose free or unit"),
        ("relu", "sparsifier.penalty=tanh", "relu has no 'penalty'"),
        ("p_anneal", "sparsifier.end=0", "must be above 0"),
        ("p_anneal", "sparsifier.changes=0", "must be at least 1"),
        ("p_anneal", "sparsifier.start=1.5", "a share of the tokens"),
        ("gated", "budget=uniform", "only feature_choice"),
        ("gated", "aux_loss=aux_k", "Choose aux_loss=none or aux_zipf"),
        ("relu", "parametrisation=aligned", "Add sparsifier.norms=unit"),
        ("jumprelu", "sparsifier.threshold=1e30", "must be above 0 and at most 10"),
    ],
)
def test_what_means_nothing_is_refused(name: str, typed: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_config([f"sparsifier={name}", typed])
