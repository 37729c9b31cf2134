"""The export of all SAEs of a run: what is read once for all, and that none of them changes another or the run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_train.config import BlockLayerConfig, ParallelConfig, RunConfig, SaeConfig
from sae_train.errors import DataError
from sae_train.formats import native
from sae_train.harvest.build import StreamFacts, build_stream, check_stream
from sae_train.phases import Phases
from sae_train.ranks.interface import Ranks, Solo
from sae_train.training import thresholds
from sae_train.training.export import Exported, check_held_out, export_all, write_export
from sae_train.training.run import plan_of
from sae_train.training.thresholds import site_groups
from sae_train.training.trainer import Trainer, build_trainer
from tools.grid_of_threads import LOADING, on_grid
from tools.small_runs import run_config
from tools.tiny_models import live_config, save_model, save_sentences

STEPS = 3
SITES = ("residual1", "mlp2", "attention0")
SAES = {
    "topk": ("residual1", run_config(sparsifier="topk", n_features=96)),
    "mutual": ("mlp2", run_config(n_features=64)),
    "feature": ("residual1", run_config(sparsifier="feature_choice", n_features=80)),
    "jump": ("attention0", run_config(sparsifier="jumprelu", n_features=64)),
    "coefficient": ("mlp2", run_config(sparsifier="jumprelu", k=4.0, n_features=64)),
    "gated": ("mlp2", run_config(sparsifier="gated", n_features=48)),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    text = save_sentences(tmp_path_factory.mktemp("text"), 300)
    return live_config(save_model(tmp_path_factory.mktemp("model")), text, evaluation_tokens=200)


def sae_of(name: str) -> SaeConfig:
    """Return the settings of one of `SAES`."""
    site, config = SAES[name]
    sae = config.sae
    if name == "coefficient":  # thresholds are exported as learned
        sae = replace(sae, k=None, sparsifier=replace(sae.sparsifier, coefficient=1e-3))
    return replace(sae, layer=BlockLayerConfig(kind=site[:-1], index=int(site[-1])))


def built(config: RunConfig, names: list[str], ranks: Ranks) -> tuple[Trainer, StreamFacts]:
    """Return a trainer whose stream has begun, and the facts of the stream."""
    saes = [sae_of(name) for name in names]
    source = config.source_for(saes)
    with LOADING:
        facts = check_stream(source, n_ranks=ranks.size)
        plan = plan_of(config, facts, n_ranks=ranks.size, saes=saes)
        stream = build_stream(source, ranks=ranks, facts=facts)
    stream.start()
    return build_trainer(source, plan, stream=stream, precision="float32", ranks=ranks), facts


def trained(config: RunConfig, names: list[str], ranks: Ranks | None = None) -> tuple[Trainer, StreamFacts]:
    trainer, facts = built(config, names, ranks or Solo())
    for step in range(STEPS):
        trainer.step(trainer.stream.batch(step))
    return trainer, facts


@pytest.fixture(scope="module")
def run(config: RunConfig) -> tuple[Trainer, StreamFacts]:
    """A run of all `SAES` after some steps."""
    return trained(config, list(SAES))


def assert_same(made: list[Exported], expected: list[Exported]) -> None:
    """Check that exports are equal bit for bit."""
    for (learner, sae, figures), (own, own_sae, own_figures) in zip(made, expected, strict=True):
        assert learner.name == own.name
        assert figures == own_figures, learner.name
        assert (sae.k, sae.inference) == (own_sae.k, own_sae.inference)
        for name in native.TENSORS:
            assert torch.equal(getattr(sae, name), getattr(own_sae, name)), (learner.name, name)


def passes_of(trainer: Trainer) -> tuple[list[Exported], list[int]]:
    """Return the export, and the number of contexts of each forward pass of the language model."""
    assert trainer.stream.language_model is not None
    passes: list[int] = []
    handle = trainer.stream.language_model.model.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    made = export_all(trainer)
    handle.remove()
    return made, passes


def test_the_half_is_read_once_for_each_group_of_sites(
    run: tuple[Trainer, StreamFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = run
    together, passes = passes_of(trainer)
    half = trainer.stream.held_out.batches("calibration", max_tokens=200, ranks=Solo())
    n_batches = len(list(half))
    assert len(SITES) < len(SAES)
    monkeypatch.setattr(thresholds, "CALIBRATION_BYTES", 1)
    one_by_one, more_passes = passes_of(trainer)
    assert len(more_passes) - len(passes) == (len(SITES) - 1) * n_batches
    assert_same(one_by_one, together)


def test_an_sae_among_others_is_exported_as_it_is_alone(config: RunConfig, run: tuple[Trainer, StreamFacts]) -> None:
    together = export_all(run[0])
    for number, name in enumerate(SAES):
        assert_same(export_all(trained(config, [name])[0]), together[number : number + 1])
    assert len({figures["fvu"] for _, _, figures in together}) == len(SAES)
    for learner, _, figures in together:
        has_budget = learner.config.sparsifier.name in ("topk", "mutual_choice", "feature_choice")
        assert not has_budget or figures["l0"] == pytest.approx(figures["target_l0"], rel=0.25)


def test_an_export_changes_nothing(config: RunConfig) -> None:
    plain, exporting = (trained(config, ["topk", "mutual"])[0] for _ in range(2))
    export_all(exporting)
    for step in range(STEPS, STEPS + 2):
        for trainer in (plain, exporting):
            trainer.step(trainer.stream.batch(step))
    for one, other in zip(plain.learners, exporting.learners, strict=True):
        for name, value in one.dictionary.named_parameters():
            assert torch.equal(value, other.dictionary.get_parameter(name)), name


@pytest.mark.parametrize("size", [2, 4])
def test_saes_that_live_on_one_rank_each_are_exported_as_in_one_process(
    size: int, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks differ in their number of SAEs, and with two SAEs some have none."""
    names = list(SAES)[:3] if size == 2 else list(SAES)[:2]
    monkeypatch.setattr(thresholds, "CALIBRATION_BYTES", 1)  # several groups, in which some ranks have no SAE
    alone = {each.learner.name: each for each in export_all(trained(config, names)[0])}
    spread = replace(config, parallel=ParallelConfig(layout="saes"))

    def work(ranks: Ranks) -> tuple[list[Exported], int]:
        trainer, meetings = trained(spread, names, ranks)[0], 0

        def meet() -> None:
            nonlocal meetings
            meetings += 1

        return export_all(trainer, Phases(together=meet)), meetings

    results = on_grid((1, size), work)
    assert len({meetings for _, meetings in results}) == 1  # else ranks would wait for each other for ever
    found = [made for made, _ in results]
    assert sorted(each.learner.name for made in found for each in made) == sorted(alone)
    assert any(len(made) != len(found[0]) for made in found)
    for made in found:
        assert all(learner.ranks.size == 1 for learner, _, _ in made)
        assert_same(made, [alone[learner.name] for learner, _, _ in made])


def test_sae_json_names_the_site_and_what_all_sites_share(run: tuple[Trainer, StreamFacts], tmp_path: Path) -> None:
    trainer, facts = run
    written: dict[str, Any] = {}
    for learner, sae, figures in export_all(trainer):
        path = tmp_path / "saes" / learner.name
        write_export(sae, path, trainer=trainer, learner=learner, facts=facts, figures=figures)
        written[learner.name] = json.loads((path / "sae.json").read_text())
        assert torch.equal(native.load(tmp_path, learner.name).W_dec, sae.W_dec)
    for learner, (site, _) in zip(trainer.learners, SAES.values(), strict=True):
        entry = written[learner.name]
        assert entry["site"] == entry["source"]["site"] == site
        assert f".{site[-1]}" in entry["source"]["module"]
        assert entry["source"]["model"] == trainer.source.model.id
        assert entry["normalisation"]["scale"] == trainer.stream.scalings[site].scale
        assert entry["normalisation"]["centre_norm"] == float(trainer.stream.scalings[site].centre_D.norm())
    scales = {entry["normalisation"]["scale"] for entry in written.values()}
    assert len(scales) == len(SITES)


def test_learned_thresholds_are_in_the_units_of_their_own_site(run: tuple[Trainer, StreamFacts]) -> None:
    trainer, _ = run
    (made,) = (each for each in export_all(trainer) if each.learner.config.k is None)
    rule = made.learner.sparsifier.export(made.learner.dictionary, made.learner.step_info(trainer.n_done))
    assert rule.threshold_F is not None
    scale = trainer.stream.scalings["mlp2"].scale
    torch.testing.assert_close(made.sae.threshold, (rule.threshold_F * scale).float())
    assert made.sae.k == made.figures["target_l0"]


@pytest.mark.parametrize("site", SITES)
def test_a_site_without_held_out_rows_is_named_before_training(config: RunConfig, site: str) -> None:
    trainer, _ = built(config, ["topk", "mutual", "jump"], Solo())
    check_held_out(trainer.stream, ranks=trainer.ranks)
    trainer.stream.held_out.limits[site] = 0.0
    with pytest.raises(DataError, match=f"calibration half passes the outlier filter of {site}"):
        check_held_out(trainer.stream, ranks=trainer.ranks)


@given(st.lists(st.integers(1, 100), max_size=12), st.integers(1, 50))
def test_groups_hold_as_many_sites_as_fit(widths: list[int], n_tokens: int) -> None:
    room, thresholds.CALIBRATION_BYTES = thresholds.CALIBRATION_BYTES, 5000
    try:
        groups = site_groups({str(site): width for site, width in enumerate(widths)}, n_tokens=n_tokens)
    finally:
        thresholds.CALIBRATION_BYTES = room
    sizes = [[4 * n_tokens * widths[int(site)] for site in group] for group in groups]
    assert [site for group in groups for site in group] == [str(site) for site in range(len(widths))]
    for own, following in zip(sizes, [*sizes[1:], [5001]], strict=False):
        assert len(own) == 1 or sum(own) <= 5000
        assert sum(own) + following[0] > 5000
