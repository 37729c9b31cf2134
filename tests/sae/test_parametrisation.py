"""Aligned dictionaries: the product of encoder and decoder row is one at every step, and gradients take both paths."""

from pathlib import Path

import pytest
import torch

from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.trainable import AlignedAutoencoder, TrainableAutoencoder
from tools import grid_world as world
from tools.command_line import Command, changed


def aligned(n_features: int = 6, d_model: int = 4) -> AlignedAutoencoder:
    made = AlignedAutoencoder.initial(d_model=d_model, n_features=n_features, seed=0, dtype=torch.float64, device="cpu")
    assert isinstance(made, AlignedAutoencoder)
    return made


def products(dictionary: TrainableAutoencoder) -> torch.Tensor:
    return (dictionary.W_enc * dictionary.W_dec).sum(1).detach()


def test_it_starts_as_its_decoder() -> None:
    dictionary = aligned()
    assert torch.equal(dictionary.W_enc, dictionary.W_dec)
    assert [name for name, _ in dictionary.named_parameters()] == ["W_free", "b_enc", "W_dec", "b_dec"]


def test_gradients_reach_both_parts() -> None:
    dictionary = aligned()
    with torch.no_grad():
        dictionary.W_free.normal_(generator=torch.Generator().manual_seed(1))
    weight = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def loss(W_free: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
        made = AlignedAutoencoder(W_free.detach(), dictionary.b_enc, W_dec.detach(), dictionary.b_dec)
        return (weight * made.W_enc).square().sum() + (weight * made.W_dec).sum()

    made = AlignedAutoencoder(dictionary.W_free.detach(), dictionary.b_enc, dictionary.W_dec.detach(), dictionary.b_dec)
    ((weight * made.W_enc).square().sum() + (weight * made.W_dec).sum()).backward()
    step = 1e-6
    for name in ("W_free", "W_dec"):
        grad = getattr(made, name).grad
        for at in ((0, 0), (3, 2), (5, 3)):
            nudged = {key: getattr(dictionary, key).detach().clone() for key in ("W_free", "W_dec")}
            nudged[name][at] += step
            higher = loss(nudged["W_free"], nudged["W_dec"])
            nudged[name][at] -= 2 * step
            lower = loss(nudged["W_free"], nudged["W_dec"])
            assert float(grad[at]) == pytest.approx(float(higher - lower) / (2 * step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("sparsifier", ["topk", "mutual_choice", "feature_choice"])
def test_rows_stay_aligned_through_training(tmp_path: Path, sparsifier: str, precision: str) -> None:
    world.write_activations(tmp_path)
    case = [f"sparsifier={sparsifier}", "parametrisation=aligned", "optimizer.lr=1e-2"]
    trainer = world.build(world.config_of(tmp_path, case, precision=precision), Solo())
    before = trainer.learners[0].dictionary.W_enc.detach().clone()
    for number in range(world.STEPS):
        trainer.step(trainer.stream.batch(number))
        bound = 1e-12 if precision == "float64" else 1e-5
        assert float((products(trainer.learners[0].dictionary) - 1).abs().max()) < bound
    after = trainer.learners[0].dictionary.W_enc.detach()
    assert float((after - before).abs().max()) > 0.01
    assert float((after - trainer.learners[0].dictionary.W_dec.detach()).abs().max()) > 0.01
    sae = SparseAutoencoder.fold(
        trainer.learners[0].dictionary, centre_D=torch.zeros(world.D), scale=1.0, k=5.0, inference="threshold"
    )
    torch.testing.assert_close(sae.W_enc, after.t().float(), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_an_aligned_run_is_made_and_resumes_its_name(tmp_path: Path, command: Command, tiny: list[str]) -> None:
    typed = changed(tiny, "parametrisation=aligned", "nesting=matryoshka", "tokens=4096")
    done = command(*typed)
    assert done.status == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert "mutual_choice.matryoshka.aligned.k8" in run.name
    assert command(*typed).stdout.startswith("already finished")
