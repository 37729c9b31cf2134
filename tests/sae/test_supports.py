"""On fresh batches of training's size the exported autoencoder fires where training's own selection would."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_train.cli.compose import compose_config
from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.training.trainer import Trainer
from tools import supports
from tools.grid_world import build
from tools.one_of_each import only, only_export

D, TRUE, F, K, N, STEPS, BLOCK = 32, 160, 192, 6, 512, 120, 256
FEATURE_CHOICE = ["sparsifier=feature_choice", "budget=zipf", "sparsifier.after=0.6"]


def activations(n_blocks: int, *, seed: int) -> Tensor:
    """Blocks of rows with a subject each: sums of known directions, of which a subject has some more and some less."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(TRUE, D, generator=torch.Generator().manual_seed(7))
    law = 1 / (torch.arange(TRUE) + 8.0) ** 0.8
    subject = (0.4 * torch.randn(n_blocks, 1, TRUE, generator=generator)).exp()
    chance = (5 * law / law.sum() * subject).clamp(max=0.9)
    active = torch.rand(n_blocks, BLOCK, TRUE, generator=generator) < chance
    strength = 0.5 + torch.rand(n_blocks, BLOCK, TRUE, generator=generator)
    rows = ((active * strength) @ directions).flatten(0, 1)
    return rows + 0.2 * torch.randn(rows.shape, generator=generator) + 1


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of activations to train on, and others to hold out."""
    folder = tmp_path_factory.mktemp("rows")
    for name, n_blocks, seed in (("train", 160, 0), ("held_out", 240, 1)):
        (folder / name).mkdir()
        save_file({"activations": activations(n_blocks, seed=seed)}, str(folder / name / "rows.safetensors"))
    return folder


def trained(rows: Path, *choices: str) -> tuple[Trainer, SparseAutoencoder]:
    """Return the trainer of a short run, and the SAE that it exports."""
    config = compose_config([
        "harvest=tensors", f"harvest.path={rows / 'train'}", f"harvest.held_out={rows / 'held_out'}", "tracking=none",
        f"k={K}", f"n_features={F}", f"batch_tokens={N}", f"tokens={N * STEPS}", "harvest.calibration_tokens=4096",
        f"evaluation_tokens={120 * BLOCK}", "precision=float32", *choices,
    ])  # fmt: skip
    trainer = build(config, Solo())
    while trainer.n_done < trainer.plan.steps:
        trainer.step(trainer.stream.batch(trainer.n_done))
    sae, _ = only_export(trainer)
    return trainer, sae


def fresh_pairs(trainer: Trainer, sae: SparseAutoencoder) -> list[supports.Supports]:
    """Return both supports on batches of rows that nothing has seen, mixed as training's are."""
    fresh = activations(60, seed=2)
    order = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(0))
    return list(supports.compared(trainer, sae, fresh[order]))


@pytest.mark.parametrize(("name", "least"), [("topk", 0.9999), ("mutual_choice", 0.95)])
def test_the_support_is_trainings(rows: Path, name: str, least: float) -> None:
    """TopK's wholly, but for affinities that rounding makes change places."""
    pairs = fresh_pairs(*trained(rows, f"sparsifier={name}"))
    assert len(pairs) == 30
    assert supports.jaccard(pairs) > least


def test_feature_choice_fires_as_often_as_its_budgets_say(rows: Path) -> None:
    trainer, sae = trained(rows, *FEATURE_CHOICE)
    assert supports.share_within(trainer, sae) >= 0.99
    pairs = fresh_pairs(trainer, sae)
    budget = (
        trainer.learners[0]
        .sparsifier.export(trainer.learners[0].dictionary, trainer.learners[0].step_info(trainer.n_done))
        .share_F
    )
    assert budget is not None
    predicted = supports.poisson_jaccard(budget * N, n_tokens=N)
    assert supports.jaccard(pairs) == pytest.approx(predicted, abs=0.03)
    fires = sum(float(pair.exported.sum()) for pair in pairs) / (len(pairs) * N)
    assert fires == pytest.approx(K, rel=0.02)
    sae.threshold.mul_(1.05)
    assert supports.share_within(trainer, sae) < 0.9, "a threshold that is a little off is noticed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jumprelu", "gated", "relu", "p_anneal"])
def test_thresholds_that_training_learned_are_kept_up_to_a_correction(rows: Path, name: str) -> None:
    trainer, sae = trained(rows, f"sparsifier={name}")
    pairs = fresh_pairs(trainer, sae)
    assert supports.jaccard(pairs) > 0.85
    learned = (
        trainer.learners[0]
        .sparsifier.export(trainer.learners[0].dictionary, trainer.learners[0].step_info(trainer.n_done))
        .threshold_F
    )
    assert learned is not None
    sae.threshold.copy_(learned.detach().double() * only(trainer.stream.scalings).scale)
    assert supports.jaccard(fresh_pairs(trainer, sae)) > 0.9999


def test_poisson_counts_predict_what_drawing_them_finds() -> None:
    mean = torch.tensor([0.3, 1.0, 4.6, 20.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.poisson(mean.expand(40_000, 5), generator=generator)
    kept = mean.floor() + (torch.rand(40_000, 5, generator=generator) < mean % 1)
    share = float(torch.minimum(drawn, kept).sum() / torch.maximum(drawn, kept).sum())
    assert supports.poisson_jaccard(mean, n_tokens=200) == pytest.approx(share, abs=0.003)
