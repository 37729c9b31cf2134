"""Thresholds, figures and the file of an export are the same in every layout of processes."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_train.errors import CheckpointError, UserError
from sae_train.evaluation.evaluate import evaluate_all
from sae_train.evaluation.metric import Subject
from sae_train.formats import native
from sae_train.harvest.language_model import LanguageModel
from sae_train.ranks.interface import Ranks, Solo
from tools.grid_world import end, free_port, join
from tools.held_out_rows import CASES, Case, F, Rows, calibrated, held_out_text, subject
from tools.random_sae import manifest_of
from tools.small_runs import CPU
from tools.tiny_models import live_config, save_model

LAYOUTS = {2: [2, 1], 4: [4, 2]}


def export(case: Case, directory: Path, ranks: Ranks) -> dict[str, Any]:
    """Write the export; return every figure."""
    sae, found = calibrated(case, ranks)
    subjects = [Subject(sae=sae, site="here", centre_D=sae.b_dec.detach(), n_features=F, ranks=ranks)]
    (figures,) = evaluate_all(subjects, Rows(), max_tokens=1, language_model=None, ranks=ranks)
    figures |= {"target_l0": found.target_l0, "used_share": found.used_share} | figures.pop("density")
    native.save(sae, directory, manifest=manifest_of(sae, n_features=F, site="here"), ranks=ranks)
    return figures


def read_text(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Return the figures on text, with the losses of a small language model."""
    config = live_config(folder)
    model = LanguageModel(config.source, device=CPU)
    held_out = held_out_text(config, model)
    subjects = [subject("one threshold", ranks, site="residual1")]
    (figures,) = evaluate_all(subjects, held_out, max_tokens=150, language_model=model, ranks=ranks)
    return figures | figures.pop("density")


def refusals(folder: Path, ranks: Ranks) -> list[list[str | None]]:
    """Return the message of each rank for a file that cannot be created, a full disk and a bad batch."""
    sae, _ = calibrated(CASES["one threshold"], ranks)

    def told(directory: Path) -> str | None:
        try:
            native.save(sae, directory, manifest=manifest_of(sae, n_features=F), ranks=ranks)
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
        subjects = [subject("one threshold", ranks)]
        evaluate_all(subjects, Rows(bad=(1, "here")), max_tokens=1, language_model=None, ranks=ranks)
        answers.append(None)
    except UserError as error:
        answers.append(str(error))
    return [list(each) for each in zip(*ranks.gather_objects(answers), strict=True)]


def do_all(rank: int, size: int, port: int, folder: Path) -> None:
    """Run all cases in one process of a group; the first writes the results."""
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
    """The cases above cover budgets that are met, one that cannot be met, and silent features."""
    figures = {name: export(case, tmp_path / name, Solo()) for name, case in CASES.items()}
    assert figures["topk"]["l0"] == pytest.approx(6.0)
    assert figures["one threshold"]["l0"] == pytest.approx(6.0, rel=0.1)
    assert 0.05 < figures["budget not used up"]["used_share"] < 0.9
    assert 0 < figures["one threshold"]["dead_fraction"] < 1
    assert all(0.1 < each["decoder_cosine_max"] < 0.9 for each in figures.values())


def test_the_language_model_sees_what_the_autoencoder_makes(tmp_path: Path) -> None:
    """The spliced loss equals the loss of a plain forward pass through language model and autoencoder."""
    config = live_config(save_model(tmp_path))
    model = LanguageModel(config.source, device=CPU)
    evaluated = subject("one threshold", Solo(), site="residual1")
    sae, held_out = evaluated.sae, held_out_text(config, model)
    (figures,) = evaluate_all([evaluated], held_out, max_tokens=150, language_model=model, ranks=Solo())
    losses = []
    for batch in held_out.batches("evaluation", max_tokens=150, ranks=Solo()):
        kept_BT, ids_BT = batch.sites["residual1"].kept_BT, batch.ids_BT
        assert kept_BT is not None
        assert ids_BT is not None

        def through(acts_BTD: Tensor, kept_BT: Tensor = kept_BT) -> Tensor:
            return torch.where(kept_BT.unsqueeze(-1), sae(acts_BTD), acts_BTD)

        logits = model.logits(ids_BT, replace={"residual1": through})[:, :-1]
        loss_BT = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids_BT[:, 1:], reduction="none")
        losses.append(loss_BT[kept_BT[:, :-1]])
    assert figures["ce"] + figures["delta_ce"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert figures["kl"] > 0
