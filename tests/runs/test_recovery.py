"""Ground truth: activations that are sparse sums of known directions give those directions back."""

import pytest
import torch
from torch import Tensor

from sae_train.ranks.interface import Solo
from sae_train.sae.aux_loss import build_aux_loss
from sae_train.sae.firing import Firing
from sae_train.sae.losses import reconstruction_loss
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers import build_sparsifier
from sae_train.training.optimizer import Adam
from tools.sae_parts import sizes_of
from tools.small_runs import CPU, run_config, schema_of

D, TRUE, F, K, BATCH, STEPS = 64, 128, 256, 4, 256, 600
PEAK = 1e-2
CHOICES = {
    "topk": {"sparsifier": "topk"},
    "mutual_choice": {"sparsifier": "mutual_choice"},
    "feature_choice": {"sparsifier": "feature_choice", "budget": "zipf", "after": 0.5},
}


def density_of_truth() -> Tensor:
    """Zipf's law in the rank of a direction; K of them are active in the mean."""
    weight = 1 / (torch.arange(TRUE, dtype=torch.float64) + 2)
    return weight / weight.sum() * K


def truth() -> Tensor:
    """[TRUE, D] unit directions, twice as many as dimensions."""
    rows = torch.randn(TRUE, D, generator=torch.Generator().manual_seed(17))
    return rows / rows.norm(dim=1, keepdim=True)


def stream(*, seed: int) -> list[Tensor]:
    """Batches of normalised activations."""
    generator = torch.Generator().manual_seed(seed)
    n = STEPS * BATCH
    active = torch.rand(n, TRUE, generator=generator) < density_of_truth()
    assert int(active.sum(0).min()) >= 200, "the rarest direction is seen often enough to be learnt"
    strength = 0.5 + torch.rand(n, TRUE, generator=generator)
    x = (active * strength) @ truth()
    x = x - x.mean(0)
    return list((x / x.square().sum(1).mean().sqrt()).split(BATCH))


def learning_rate(step: int) -> float:
    """Warm up over a twentieth of the run, fall to 0 over its last third."""
    return PEAK * min(1, (step + 1) / (0.05 * STEPS), (STEPS - step) / (0.33 * STEPS))


def train(*, seed: int = 0, **choices: object) -> TrainableAutoencoder:
    config = run_config(k=K, batch_tokens=BATCH, tokens=BATCH * STEPS, **choices)
    dictionary = TrainableAutoencoder.initial(d_model=D, n_features=F, seed=seed, dtype=torch.float32, device=CPU)
    window = BATCH * STEPS // 8
    sizes = sizes_of(config, n_features=F, d_model=D, dead_window=window)
    sparsifier, aux = build_sparsifier(config.sae, sizes, ranks=Solo()), build_aux_loss(config.sae, sizes)
    firing = Firing(F, half_life_tokens=window, device=CPU)
    optimizer = Adam(dictionary, schema_of(clip=1.0), rates={})
    for step, x in enumerate(stream(seed=seed)):
        info = StepInfo(
            step=step,
            tokens=step * BATCH,
            total_tokens=STEPS * BATCH,
            batch_tokens=BATCH,
            learning_rate=1e-3,
            seed=seed,
        )
        pre = dictionary.pre_activations(x)
        inputs = StepInputs(x_ND=x, pre_NF=pre, info=info, firing=firing, ranks=Solo())
        code = sparsifier.encode(dictionary, inputs).code
        x_hat = dictionary.decode(code, ranks=Solo())
        loss = reconstruction_loss(x, x_hat, n_tokens=BATCH)
        if aux is not None:
            loss = loss + aux(dictionary, inputs, x - x_hat)
        loss.backward()
        norm = optimizer.gradient_norm(Solo())
        optimizer.step(lr=learning_rate(step), norm=norm, halted=torch.tensor(False))
        firing.update(code, n_tokens=BATCH, ranks=Solo())
    return dictionary


def recovery(dictionary: TrainableAutoencoder) -> Tensor:
    """[TRUE] largest cosine of each true direction with a feature's decoder row."""
    return (truth() @ dictionary.W_dec.detach().t()).amax(1)


@pytest.mark.parametrize("name", CHOICES)
def test_true_directions_are_found(name: str) -> None:
    found = recovery(train(aux="aux_k", **CHOICES[name]))
    assert float(found.mean()) > 0.98
    assert float((found > 0.9).double().mean()) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("aux", ["aux_k", "aux_zipf"])
@pytest.mark.parametrize("name", CHOICES)
def test_true_directions_are_found_whatever_the_seed(name: str, aux: str, seed: int) -> None:
    assert float(recovery(train(seed=seed, aux=aux, **CHOICES[name])).mean()) > 0.95
