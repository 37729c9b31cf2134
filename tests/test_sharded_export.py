"""However features and tokens are spread over processes: the same thresholds, the same figures, the same file."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from grid_world import end, free_port, join
from safetensors.torch import load_file
from small_runs import CPU, run_config
from tiny_models import live_config, save_model, sentences
from torch import Tensor

from sae_train.errors import CheckpointError, DataError, UserError
from sae_train.evaluation.evaluate import evaluate
from sae_train.formats import native
from sae_train.harvest.held_out import Half, HeldOut, HeldOutBatch, TextHeldOut
from sae_train.harvest.language_model import LanguageModel, Tokenizer
from sae_train.harvest.text import Part
from sae_train.ranks import Ranks, Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.calibration import Calibration, calibrate
from sae_train.sae.dictionary import Dictionary
from sae_train.sae.moment import Moment
from sae_train.sparsifiers import Sparsifier, build_sparsifier

D, F, BATCH = 32, 97, 64
END = Moment(step=9, tokens=9 * BATCH, total_tokens=9 * BATCH, batch_tokens=BATCH, learning_rate=1e-3, seed=0)
SIZES = [37, 5, 0, 64, 11]
"""Tokens of the held-out batches: ragged, one empty, and not as many batches as ranks."""


class Case(NamedTuple):
    sparsifier: str
    budget: str = "pooled"
    bias: float = 0.0


CASES = {
    "topk": Case("topk"),
    "one threshold": Case("mutual_choice"),
    "budget not used up": Case("mutual_choice", bias=-9.0),
    "a threshold each": Case("feature_choice", "uniform"),
    "zipf": Case("feature_choice", "zipf"),
}
LAYOUTS = {2: [2, 1], 4: [4, 2]}


class Rows(HeldOut):
    """Held-out batches of random rows; one may be bad."""

    def __init__(self, ranks: Ranks, *, bad: int | None = None) -> None:
        self._ranks, self._bad = ranks, bad

    def n_tokens(self, half: Half, *, max_tokens: int) -> int:
        return sum(SIZES)

    def batches(self, half: Half, *, max_tokens: int, with_logits: bool = False) -> Iterator[HeldOutBatch]:
        for number, size in enumerate(SIZES):
            if number % self._ranks.size != self._ranks.rank:
                continue
            if number == self._bad:
                raise DataError("this batch is bad")
            context_N = 100 * number + torch.arange(size) // 7
            yield HeldOutBatch(raw_ND=tokens(size, seed=number), context_N=context_N, ids_BT=None, kept_BT=None)


def tokens(n: int, *, seed: int) -> Tensor:
    return 1 + torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def shard(case: Case, ranks: Ranks) -> tuple[SparseAutoencoder, Sparsifier]:
    """Return this rank's features, folded, in float64."""
    config = run_config(sparsifier=case.sparsifier, budget=case.budget, k=6.0, batch_tokens=BATCH, tokens=END.tokens)
    sparsifier = build_sparsifier(config, n_features=F)
    generator = torch.Generator().manual_seed(7)
    W_enc, W_dec = torch.randn(2, F, D, generator=generator, dtype=torch.float64)
    b_enc = case.bias + torch.randn(F, generator=generator, dtype=torch.float64)
    b_dec = torch.randn(D, generator=generator, dtype=torch.float64)
    own = slice(*ranks.features.slice(F))
    dictionary = Dictionary(W_enc[own], b_enc[own], W_dec[own], b_dec)
    sae = SparseAutoencoder.fold(dictionary, centre_D=torch.ones(D), scale=1.3, k=6.0, inference=sparsifier.inference)
    return sae.double(), sparsifier


def calibrated(case: Case, ranks: Ranks) -> tuple[SparseAutoencoder, Calibration]:
    sae, sparsifier = shard(case, ranks)
    raw = tokens(3 * BATCH + 5, seed=99)
    found = calibrate(sae, raw, sparsifier=sparsifier, moment=END, n_features=F, ranks=ranks)
    sae.threshold.copy_(found.threshold_F)
    return sae, found


def export(case: Case, directory: Path, ranks: Ranks) -> dict[str, Any]:
    """Write the export; return every figure."""
    sae, found = calibrated(case, ranks)
    figures = evaluate(sae, Rows(ranks), max_tokens=1, language_model=None, n_features=F, ranks=ranks)
    figures |= {"target_l0": found.target_l0, "used_share": found.used_share} | figures.pop("density")
    native.save(sae, directory, facts={"site": "here"}, n_features=F, ranks=ranks)
    return figures


def read_text(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Return the figures on text, with the losses of a small language model."""
    config = live_config(folder)
    model = LanguageModel(config, device=CPU)
    held_out = held_out_text(config, model, ranks)
    sae, _ = calibrated(CASES["one threshold"], ranks)
    figures = evaluate(sae, held_out, max_tokens=150, language_model=model, n_features=F, ranks=ranks)
    return figures | figures.pop("density")


def held_out_text(config: Any, model: LanguageModel, ranks: Ranks) -> TextHeldOut:
    parts = (Part(text, is_end=True) for text in sentences(40))
    held_out = TextHeldOut(parts, language_model=model, tokenizer=Tokenizer(config.model), context_length=16,
                           contexts_per_batch=2, ranks=ranks, site="here")  # fmt: skip
    held_out.limit = 1e9
    return held_out


def refusals(folder: Path, ranks: Ranks) -> list[list[str | None]]:
    """Return what each rank is told when a file cannot be made, the disk is full, and a batch is bad."""
    sae, _ = calibrated(CASES["one threshold"], ranks)

    def told(directory: Path) -> str | None:
        try:
            native.save(sae, directory, facts={}, n_features=F, ranks=ranks)
        except CheckpointError as error:
            return str(error)
        return None

    answers = [told(folder / "file" / "below")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.is_first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    answers.append(told(folder / "full"))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    try:
        evaluate(sae, Rows(ranks, bad=1), max_tokens=1, language_model=None, n_features=F, ranks=ranks)
        answers.append(None)
    except UserError as error:
        answers.append(str(error))
    return [list(each) for each in zip(*ranks.gather_objects(answers), strict=True)]


def do_all(rank: int, size: int, port: int, folder: Path) -> None:
    """What each process runs; the first leaves what came out."""
    native.PIECE_BYTES = 3000
    ranks = join(rank, size, port)
    found: dict[str, Any] = {}
    for columns in LAYOUTS[size]:
        ranks = ranks.arranged(columns=columns)
        for name, case in CASES.items():
            found[f"{name} {columns}"] = export(case, folder / f"{name} {columns}", ranks)
        if size == 2:
            found[f"text {columns}"] = read_text(folder / "model", ranks)
    found["refusals"] = refusals(folder, ranks)
    if ranks.is_first:
        torch.save(found, folder / "found.pt")
    end()


@pytest.mark.multirank
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layouts_agree(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    save_model(tmp_path / "model")
    torch.multiprocessing.spawn(do_all, args=(size, free_port(), tmp_path), nprocs=size)
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    for name, case in CASES.items():
        alone = export(case, tmp_path / name, Solo())
        tensors = load_file(str(tmp_path / name / "sae.safetensors"))
        for columns in LAYOUTS[size]:
            assert found[f"{name} {columns}"] == pytest.approx(alone, rel=1e-9), (name, columns)
            others = load_file(str(tmp_path / f"{name} {columns}" / "sae.safetensors"))
            assert all(torch.equal(tensors[key], others[key]) for key in native.TENSORS), (name, columns)
            notes = [(tmp_path / each / "sae.json").read_text() for each in (name, f"{name} {columns}")]
            assert notes[0] == notes[1]
    if size == 2:
        alone = read_text(tmp_path / "model", Solo())
        for columns in LAYOUTS[size]:
            assert found[f"text {columns}"] == pytest.approx(alone, rel=1e-5), columns
    blocked, full, bad = found["refusals"]
    assert len(set(blocked)) == len(set(full)) == len(set(bad)) == 1
    assert str(tmp_path / "file" / "below") in blocked[0]
    assert "cannot be written: File too large" in full[0]
    assert bad[0] == "this batch is bad"
    assert list((tmp_path / "full").iterdir()) == []


def test_figures_of_the_cases_differ_and_are_not_trivial(tmp_path: Path) -> None:
    """What the comparison above compares: budgets that are met, one that cannot be, features that stay silent."""
    figures = {name: export(case, tmp_path / name, Solo()) for name, case in CASES.items()}
    assert figures["topk"]["l0"] == pytest.approx(6.0)
    assert figures["one threshold"]["l0"] == pytest.approx(6.0, rel=0.1)
    assert 0.05 < figures["budget not used up"]["used_share"] < 0.9
    assert 0 < figures["one threshold"]["dead_fraction"] < 1
    assert all(0.1 < each["decoder_cosine_max"] < 0.9 for each in figures.values())


def test_the_language_model_sees_what_the_autoencoder_makes(tmp_path: Path) -> None:
    """The spliced loss is that of a forward pass through language model and autoencoder, without special cases."""
    config = live_config(save_model(tmp_path))
    model = LanguageModel(config, device=CPU)
    sae, _ = calibrated(CASES["one threshold"], Solo())
    figures = evaluate(sae, held_out_text(config, model, Solo()), max_tokens=150, language_model=model,
                       n_features=F, ranks=Solo())  # fmt: skip
    losses = []
    for batch in held_out_text(config, model, Solo()).batches("evaluation", max_tokens=150):
        kept_BT, ids_BT = batch.kept_BT, batch.ids_BT
        assert kept_BT is not None
        assert ids_BT is not None

        def through(acts_BTD: Tensor, kept_BT: Tensor = kept_BT) -> Tensor:
            return torch.where(kept_BT.unsqueeze(-1), sae(acts_BTD), acts_BTD)

        logits = model.logits(ids_BT, replace=through)[:, :-1]
        loss_BT = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids_BT[:, 1:], reduction="none")
        losses.append(loss_BT[kept_BT[:, :-1]])
    assert figures["ce"] + figures["delta_ce"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert figures["kl"] > 0
