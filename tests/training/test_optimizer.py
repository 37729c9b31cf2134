"""Adam against the textbook, clipping, the halt flag, and the schedule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_train.errors import StoppedByNumbers
from sae_train.kernels import unit_rows
from sae_train.ranks.interface import Solo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.training.nonfinite import NonFinite
from sae_train.training.optimizer import Adam
from sae_train.training.schedule import is_due, learning_rate
from tools.small_runs import schema_of


def make(
    dtype: torch.dtype = torch.float64, clip: float = 0.0, bias_rate: float = 1.0
) -> tuple[TrainableAutoencoder, Adam]:
    dictionary = TrainableAutoencoder.initial(d_model=3, n_features=5, seed=0, dtype=dtype, device=torch.device("cpu"))
    config = schema_of(clip=clip)
    return dictionary, Adam(dictionary, config, rates={"b_enc": bias_rate})


def set_gradients(dictionary: TrainableAutoencoder, *, seed: int, factor: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name, parameter in dictionary.named_parameters():
        gradients[name] = factor * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = gradients[name].clone()
    return gradients


@torch.no_grad()
def by_torch(dictionary: TrainableAutoencoder, optimizer: torch.optim.Adam, *, clip: float) -> None:
    """Make a step of torch's own optimizer between an explicit projection and an explicit renormalisation."""
    rows, gradient = dictionary.W_dec, dictionary.W_dec.grad
    assert gradient is not None
    gradient -= (gradient * rows).sum(1, keepdim=True) * rows
    if clip:
        torch.nn.utils.clip_grad_norm_(dictionary.parameters(), clip)
    optimizer.step()
    rows /= rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("bias_rate", [1.0, 0.2, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_adam_between_projection_and_renormalisation(
    dtype: torch.dtype, bias_rate: float, clip: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps of several learning rates; rows pass in chunks of one or of all."""
    monkeypatch.setattr(unit_rows, "CHUNK_ELEMENTS", 3 if clip else 1 << 20)
    dictionary, adam = make(dtype, clip=clip, bias_rate=bias_rate)
    twin, _ = make(dtype)
    named = dict(twin.named_parameters())
    groups = [{"params": [p], "lr": bias_rate if name == "b_enc" else 1.0} for name, p in named.items()]
    rates = [group["lr"] for group in groups]
    expected = torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-8)
    for step in range(1, 7):
        set_gradients(dictionary, seed=step)
        set_gradients(twin, seed=step)
        for group, rate in zip(expected.param_groups, rates, strict=True):
            group["lr"] = 0.01 * step * rate
        by_torch(twin, expected, clip=clip)
        adam.step(lr=0.01 * step, norm=adam.gradient_norm(Solo()), halted=torch.tensor(False))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6  # clip_grad_norm_ adds 1e-6 to the norm
    for name, parameter in dictionary.named_parameters():
        torch.testing.assert_close(parameter.detach(), named[name].detach(), rtol=tolerance, atol=tolerance)
        for key, value in expected.state[named[name]].items():
            torch.testing.assert_close(adam.state()[f"{name}.{key}"].to(value.dtype), value, rtol=1e-4, atol=1e-6)


def test_free_norms_are_plain_adams() -> None:
    dictionary, adam = make()
    dictionary.has_unit_norms = False
    before = dictionary.W_dec.detach().clone()
    gradient = set_gradients(dictionary, seed=0)["W_dec"]
    norm = adam.gradient_norm(Solo())
    squares = [p.grad.square().sum() for p in dictionary.parameters() if p.grad is not None]
    assert torch.allclose(norm, torch.stack(squares).sum().sqrt())
    adam.step(lr=0.1, norm=norm, halted=torch.tensor(False))
    assert torch.allclose(dictionary.W_dec.detach(), before - 0.1 * gradient.sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_runs_without_values_and_mixes_no_devices(dtype: torch.dtype) -> None:
    """On torch's meta device, which stands for a GPU: every read of a value raises there."""
    dictionary = TrainableAutoencoder(
        *(torch.zeros(*shape, dtype=dtype, device="meta") for shape in ((5, 3), (5,), (5, 3), (3,)))
    )
    adam = Adam(dictionary, schema_of(clip=1.0), rates={"b_enc": 0.5})
    for parameter in dictionary.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step(lr=0.1, norm=adam.gradient_norm(Solo("meta")), halted=torch.zeros((), dtype=torch.bool, device="meta"))
    assert all(parameter.grad is None for parameter in dictionary.parameters())


def test_clipping_equals_scaling_the_gradient() -> None:
    clipped, adam = make(clip=0.5)
    scaled, plain = make()
    set_gradients(clipped, seed=1, factor=7.0)
    set_gradients(scaled, seed=1, factor=7.0)
    norm = plain.gradient_norm(Solo())
    assert norm > 0.5
    for parameter in scaled.parameters():
        assert parameter.grad is not None
        parameter.grad *= 0.5 / norm
    adam.step(lr=0.1, norm=adam.gradient_norm(Solo()), halted=torch.tensor(False))
    plain.step(lr=0.1, norm=plain.gradient_norm(Solo()), halted=torch.tensor(False))
    for a, b in zip(adam.state().values(), plain.state().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_halted_step_changes_nothing() -> None:
    dictionary, adam = make(torch.float32, clip=1.0)
    set_gradients(dictionary, seed=0)
    adam.step(lr=0.1, norm=adam.gradient_norm(Solo()), halted=torch.tensor(False))
    before = {k: v.clone() for k, v in (adam.state() | dict(dictionary.named_parameters())).items()}
    set_gradients(dictionary, seed=1, factor=float("nan"))
    adam.step(lr=0.1, norm=adam.gradient_norm(Solo()), halted=torch.tensor(True))
    after = adam.state() | dict(dictionary.named_parameters())
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_state_carries_over_bit_for_bit() -> None:
    dictionary, adam = make(torch.float32)
    set_gradients(dictionary, seed=0)
    adam.step(lr=0.1, norm=adam.gradient_norm(Solo()), halted=torch.tensor(False))
    twin, twin_adam = make(torch.float32)
    twin.load_state_dict(dictionary.state_dict())
    twin_adam.load_state({k: v.clone() for k, v in adam.state().items()})
    for each, optimizer in ((dictionary, adam), (twin, twin_adam)):
        set_gradients(each, seed=1)
        optimizer.step(lr=0.1, norm=optimizer.gradient_norm(Solo()), halted=torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(dictionary.parameters(), twin.parameters(), strict=True))


def test_halt_keeps_the_first_bad_step() -> None:
    halt, good, bad = NonFinite(torch.device("cpu")), torch.tensor(1.0), torch.tensor(float("nan"))
    norm_N = torch.ones(4)
    halt.watch(step=1, loss=good, grad_norm=good, norm_N=norm_N)
    halt.check(Solo())
    halt.watch(step=2, loss=bad, grad_norm=good, norm_N=torch.tensor([float("inf"), 2.0]))
    halt.watch(step=3, loss=good, grad_norm=bad, norm_N=norm_N)
    with pytest.raises(
        StoppedByNumbers, match=r"^loss is nan .* step 2: .* 2 activations 1 are not finite.* norm is 2 "
    ):
        halt.check(Solo())


@settings(deadline=None)
@given(steps=st.integers(1, 500), batch=st.integers(1, 4096), warmup=st.floats(0, 1), decay=st.floats(0, 1))
def test_schedule_warms_up_holds_and_decays(steps: int, batch: int, warmup: float, decay: float) -> None:
    total = steps * batch
    shape = {"warmup_tokens": int(warmup * total), "decay_tokens": int(decay * total), "total_tokens": total}
    rates = [learning_rate(i * batch, peak=2.0, batch_tokens=batch, **shape) for i in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    for i, rate in enumerate(rates):
        if shape["warmup_tokens"] <= (i + 1) * batch and i * batch <= total - shape["decay_tokens"]:
            assert rate == 2.0
    turn = rates.index(max(rates))
    assert rates[: turn + 1] == sorted(rates[: turn + 1])
    assert rates[turn:] == sorted(rates[turn:], reverse=True)


@given(every=st.integers(1, 1000), batch=st.integers(1, 1000), steps=st.integers(1, 50))
def test_due_counts_multiples_passed(every: int, batch: int, steps: int) -> None:
    due = [is_due(every, before=i * batch, after=(i + 1) * batch) for i in range(steps)]
    crossed = [
        any(i * batch < m * every <= (i + 1) * batch for m in range(1, steps * batch // every + 2))
        for i in range(steps)
    ]
    assert due == crossed
    assert not is_due(0, before=0, after=batch)
