"""The losses against their formulas, and where their gradients go."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.aux_loss import AuxLoss, build_aux_loss
from sae_train.sae.firing import Firing
from sae_train.sae.losses import reconstruction_loss
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sae.zipf_budget import zipf_mass
from tools.grid_of_threads import on_ranks
from tools.small_runs import CPU, run_config

N, D, F, WINDOW = 24, 10, 40, 1000
SIZES = SaeSizes(d_model=D, n_features=F, batch_tokens=N, dead_window=WINDOW)
START = StepInfo(step=0, tokens=0, total_tokens=100 * N, batch_tokens=N, learning_rate=1e-3, seed=0)


class Setting(NamedTuple):
    """A step whose features 0 to n_dead - 1 are dead."""

    dictionary: TrainableAutoencoder
    x: Tensor
    pre: Tensor
    residual: Tensor
    firing: Firing


def setting(*, n_dead: int, seed: int = 0) -> Setting:
    generator = torch.Generator().manual_seed(seed)
    dictionary = TrainableAutoencoder.initial(d_model=D, n_features=F, seed=seed, dtype=torch.float64, device=CPU)
    x, residual = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    firing = Firing(F, half_life_tokens=500, device=CPU)
    firing.since_F[:n_dead] = WINDOW
    firing.density_F = torch.rand(F, generator=generator, dtype=torch.float64) * 0.2
    firing.density_F[:n_dead] = 0
    return Setting(dictionary, x, dictionary.pre_activations(x), residual, firing)


def aux_loss(kind: str = "aux_k", **settings: float | bool) -> AuxLoss:
    config = run_config(aux=kind, k=4, **settings)
    loss = build_aux_loss(config.sae, SIZES)
    assert loss is not None
    return loss


def inputs_of(s: Setting, info: StepInfo = START, ranks: Ranks | None = None) -> StepInputs:
    return StepInputs(x_ND=s.x, pre_NF=s.pre, info=info, firing=s.firing, ranks=ranks or Solo())


def compute(loss: AuxLoss, s: Setting, ranks: Ranks | None = None) -> Tensor:
    return loss(s.dictionary, inputs_of(s, ranks=ranks), s.residual)


def by_formula(s: Setting, underuse_F: Tensor, *, k_aux: int, weight: float = 1 / 32) -> Tensor:
    """The loss with dense autograd: top affinities of those that take part, weighted, against the residual."""
    taking_part = underuse_F > 0
    affinity = torch.relu(s.x @ s.dictionary.W_enc.t() + s.dictionary.b_enc) * taking_part
    floor = affinity.topk(min(k_aux, F), dim=1).values[:, -1:]
    kept = torch.where(affinity >= floor, affinity, 0) * underuse_F
    error = (s.residual - kept @ s.dictionary.W_dec).square().sum()
    variance = (s.residual - s.residual.mean(0)).square().sum()
    return weight * min(float(taking_part.sum()) / k_aux, 1) * error / variance


def gradients(loss: Tensor, s: Setting) -> list[Tensor]:
    parameters = [s.dictionary.W_enc, s.dictionary.b_enc, s.dictionary.W_dec]
    return list(torch.autograd.grad(loss, parameters))


def test_reconstruction_loss_is_global() -> None:
    x, x_hat = torch.ones(3, 2), torch.zeros(3, 2)
    assert float(reconstruction_loss(x, x_hat, n_tokens=12)) == pytest.approx(0.5)


@pytest.mark.parametrize("n_dead", [1, 3, 5, 17, 40])
def test_aux_k_is_its_formula(n_dead: int) -> None:
    s = setting(n_dead=n_dead)
    loss = compute(aux_loss(), s)
    expected = by_formula(s, (torch.arange(F) < n_dead).double(), k_aux=D // 2)
    assert torch.allclose(loss, expected)
    for found, dense in zip(gradients(loss, s), gradients(expected, s), strict=True):
        assert torch.allclose(found, dense)


def test_gradient_reaches_the_encoder_of_dead_features_and_no_other() -> None:
    s = setting(n_dead=7)
    for grad in gradients(compute(aux_loss(), s), s):
        rows = grad.reshape(F, -1).abs().sum(1)
        assert bool((rows[:7] > 0).all())
        assert not rows[7:].any()


def test_no_gradient_flows_into_the_residual() -> None:
    s = setting(n_dead=7)
    residual = s.residual.clone().requires_grad_()
    compute(aux_loss(), s._replace(residual=residual)).backward()
    assert residual.grad is None


@pytest.mark.parametrize("kind", ["aux_k", "aux_zipf"])
def test_nothing_dead_costs_nothing(kind: str) -> None:
    s = setting(n_dead=0)
    loss = compute(aux_loss(kind, tau=0.0), s)
    assert float(loss) == 0
    assert not loss.requires_grad


def test_a_residual_without_variance_gives_zero_not_nan() -> None:
    s = setting(n_dead=5)
    loss = compute(aux_loss(), s._replace(residual=torch.ones(N, D, dtype=torch.float64)))
    assert float(loss.detach()) == 0
    for grad in gradients(loss, s):
        assert not grad.any()


@pytest.mark.parametrize("n_dead", [2, 17])
def test_zipf_loss_with_tau_zero_is_aux_k_bit_for_bit(n_dead: int) -> None:
    s = setting(n_dead=n_dead)
    plain, limit = compute(aux_loss(), s), compute(aux_loss("aux_zipf", tau=0.0, hard=True), s)
    assert torch.equal(plain, limit)
    for one, other in zip(gradients(plain, s), gradients(limit, s), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("hard", [False, True])
def test_zipf_loss_is_its_formula(hard: bool) -> None:
    s = setting(n_dead=4)
    once_dense = int(s.firing.density_F.argmax())
    s.firing.since_F[once_dense] = WINDOW  # dead, though its moving density does not show it yet
    rank = torch.empty(F, dtype=torch.int64)
    rank[s.firing.density_F.sort(descending=True, stable=True).indices] = torch.arange(F)
    expected_density = 4 * zipf_mass(F, exponent=1.0, shift=0.004 * F)[rank]
    underuse = (1 - s.firing.density_F / (0.9 * expected_density.clamp(max=1))).clamp(0, 1)
    assert float(underuse[once_dense]) < 1
    underuse[[0, 1, 2, 3, once_dense]] = 1
    assert 5 < int((underuse > 0).sum()) < F, "some are underused, some are not"
    if hard:
        underuse = (underuse > 0).double()
    loss = compute(aux_loss("aux_zipf", tau=0.9, hard=hard), s)
    expected = by_formula(s, underuse, k_aux=D // 2)
    assert torch.allclose(loss, expected)
    for found, dense in zip(gradients(loss, s), gradients(expected, s), strict=True):
        assert torch.allclose(found, dense)


def test_features_are_ranked_anew_eight_times_a_window() -> None:
    """Between, the law's densities stay with the features that they were given to; a resumed run keeps them."""
    s, loss = setting(n_dead=0), aux_loss("aux_zipf", tau=0.9)
    other = setting(n_dead=0, seed=1).firing

    def at(tokens: int, firing: Firing, which: AuxLoss) -> Tensor:
        return which.underuse(inputs_of(s._replace(firing=firing), replace(START, tokens=tokens)))

    first = at(0, s.firing, loss)
    held = at(WINDOW // 8 - 2, other, loss)
    resumed = aux_loss("aux_zipf", tau=0.9)
    resumed.load_state(loss.state())
    assert torch.equal(at(WINDOW // 8 - 2, other, resumed), held)
    renewed = at(WINDOW // 8, other, loss)
    assert not torch.equal(held, renewed)
    assert torch.equal(renewed, at(0, other, aux_loss("aux_zipf", tau=0.9)))
    assert torch.equal(first, at(0, s.firing, aux_loss("aux_zipf", tau=0.9)))


def test_shares_of_ranks_sum_to_the_loss() -> None:
    s = setting(n_dead=9)
    whole = compute(aux_loss(), s)

    def part(ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
        own = slice(ranks.rank * N // 2, (ranks.rank + 1) * N // 2)
        twin = setting(n_dead=9)
        own_part = twin._replace(x=twin.x[own], pre=twin.pre[own], residual=twin.residual[own])
        loss = compute(aux_loss(), own_part, ranks)
        return loss.detach(), gradients(loss, twin)

    parts = on_ranks(2, part)
    assert torch.allclose(parts[0][0] + parts[1][0], whole)
    for grad, one, other in zip(gradients(whole, s), parts[0][1], parts[1][1], strict=True):
        assert torch.allclose(one + other, grad)


def test_k_aux_are_at_most_512() -> None:
    assert AuxLoss(replace(SIZES, d_model=4096), weight=1.0).k_aux == 512
    assert AuxLoss(replace(SIZES, d_model=768), weight=1.0).k_aux == 384
    assert AuxLoss(replace(SIZES, d_model=1), weight=1.0).k_aux == 1


def test_none_is_none() -> None:
    assert build_aux_loss(run_config().sae, SIZES) is None
