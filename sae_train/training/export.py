"""From trained weights to an exported SAE that keeps its promise: fold, calibrate, evaluate, write."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import sae_train
from sae_train.config import SourceConfig
from sae_train.errors import DataError
from sae_train.evaluation.evaluate import evaluate_all
from sae_train.evaluation.metric import Subject
from sae_train.evaluation.registry import figures_in_rows
from sae_train.evaluation.rounds import rounds
from sae_train.formats import native
from sae_train.formats.manifest import ActivationSource, Normalisation, SaeManifest
from sae_train.harvest.build import Stream, StreamFacts
from sae_train.harvest.held_out import HALVES
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.training.learner import Learner
from sae_train.training.thresholds import Draft, set_thresholds
from sae_train.training.together import together
from sae_train.training.trainer import Trainer

ENOUGH_TOKENS = 10_000
"""Held-out tokens that are read before training."""


class Exported(NamedTuple):
    """An SAE as it would be exported now. `export_all` makes it; the session reports and writes it."""

    learner: Learner
    sae: SparseAutoencoder
    """The features that this rank holds."""
    figures: dict[str, Any]
    """Figures of all features, by their names in summary.json."""


def export_all(trainer: Trainer, phases: Phases = SILENT) -> list[Exported]:
    """Return the SAEs of this rank's learners as they would be exported now, with their figures. Collective.

    Nothing of the run changes. Thresholds are set on the calibration half; every figure comes from the evaluation half.
    An SAE whose reconstructions are not finite is left out.

    Raises:
        DataError: the data leave an FVU undefined; on every rank.
    """
    with trainer.stream.quiet():
        return _export_all(trainer, phases)


def _export_all(trainer: Trainer, phases: Phases) -> list[Exported]:
    stream, ranks, max_tokens = trainer.stream, trainer.ranks, trainer.source.held_out_tokens
    drafts = [_draft(learner, trainer) for learner in trainer.learners]
    calibrations = set_thresholds(drafts, stream, max_tokens=max_tokens, ranks=ranks, phases=phases)
    with phases.of("evaluating", total=stream.held_out.n_tokens("evaluation", max_tokens=max_tokens)):
        found = evaluate_all(
            [_subject(draft, stream) for draft in drafts],
            stream.held_out,
            max_tokens=max_tokens,
            language_model=stream.language_model,
            ranks=ranks,
            deal=_deal(trainer),
            phases=phases,
        )
    exported = [Exported(*each) for each in zip(trainer.learners, (draft.sae for draft in drafts), found, strict=True)]
    together(lambda: _check_defined(exported), ranks=ranks)
    for draft, calibration, figures in zip(drafts, calibrations, found, strict=True):
        figures |= {"target_l0": calibration.target_l0, "used_share": calibration.used_share}
        if calibration.correction is not None:
            figures["correction"] = calibration.correction
        figures |= draft.rule.notes
    return [each for each in exported if "fvu" in each.figures]


def _draft(learner: Learner, trainer: Trainer) -> Draft:
    """Return the learner's SAE on raw activations, still without thresholds."""
    scaling = trainer.stream.scalings[learner.plan.site]
    rule = learner.sparsifier.export(learner.dictionary, learner.step_info(trainer.n_done))
    sae = SparseAutoencoder.fold(
        learner.dictionary,
        centre_D=scaling.centre_D,
        scale=scaling.scale,
        k=0.0 if rule.k is None else rule.k,  # `set_thresholds` sets it where there is none
        inference=rule.inference,
        encoder=(rule.W_enc, rule.b_enc),
    )
    return Draft(learner, sae, rule)


def _subject(draft: Draft, stream: Stream) -> Subject:
    plan = draft.learner.plan
    centre_D = stream.scalings[plan.site].centre_D
    return Subject(
        sae=draft.sae, site=plan.site, centre_D=centre_D, n_features=plan.n_features, ranks=draft.learner.ranks
    )


def _deal(trainer: Trainer) -> Ranks:
    """Return the ranks that share out the evaluation half. Where SAEs live on one rank each, every rank reads it."""
    return Solo(trainer.ranks.device) if trainer.plan.layout == "saes" else trainer.ranks


def _check_defined(exported: list[Exported]) -> None:
    for learner, _, figures in exported:
        if "fvu" not in figures and "nmse" in figures:  # without both, the reconstructions are not finite
            raise DataError(
                f"held-out data: it is constant at {learner.plan.site}, so its FVU is not defined. Give other held-out "
                "data."
            )


def evaluation_figures(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an evaluation that a row of metrics.jsonl holds, by their `eval/` names."""
    return {f"eval/{key}": value for key, value in figures.items() if key in figures_in_rows()}


def write_export(
    sae: SparseAutoencoder,
    directory: Path,
    *,
    trainer: Trainer,
    learner: Learner,
    facts: StreamFacts,
    figures: dict[str, Any],
    phases: Phases = SILENT,
) -> None:
    """Write `saes/NAME/`. Collective over the learner's ranks: each brings its features, and all raise if one cannot.

    Args:
        sae: this rank's features, from `export_all`.
        directory: `saes/NAME/` of the run.
        trainer: the run's trainer.
        learner: the SAE's learner.
        facts: of the stream, with the SAE's site among its sites.
        figures: entries of sae.json under `figures`.
        phases: receives the progress, in bytes.
    """
    config, n_features = learner.config, learner.plan.n_features
    (site,) = (site for site in facts.sites if site.label == learner.plan.site)
    scaling = trainer.stream.scalings[site.label]
    manifest = SaeManifest(
        inference=sae.inference,
        k=sae.k,
        d_model=sae.d_model,
        n_features=n_features,
        site=site.label,
        source=_activation_source(
            trainer.source, facts.record | site.record, data_revision=trainer.stream.data_revision
        ),
        tokens=trainer.tokens,
        sparsifier=config.sparsifier.name,
        prefixes=list(learner.prefixes),
        seed=config.seed,
        normalisation=Normalisation(
            scale=scaling.scale,
            centre_norm=float(scaling.centre_D.norm()),
            gamma=scaling.gamma,
            outlier_limit=scaling.limit,
            folded=True,
        ),
        figures=figures,
        sae_train_version=sae_train.__version__,
    )
    with phases.of("exporting", total=native.size_of(sae.d_model, n_features), unit="B"):
        native.save(sae, directory, manifest=manifest, ranks=learner.ranks, phases=phases)


def _activation_source(
    config: SourceConfig, record: Mapping[str, Any], *, data_revision: str | None
) -> ActivationSource:
    """Return the origin of an SAE's activations: `record`, and the settings of a language model and text."""
    source = ActivationSource(**record)
    if not config.harvest.runs_model:
        return source
    return replace(
        source,
        dtype=config.model.dtype,
        data_revision=data_revision,
        context_length=config.live.context_length,
        subset=config.data.subset,
        split=config.data.split,
        text_column=config.data.text_column,
    )


def check_held_out(stream: Stream, *, ranks: Ranks) -> None:
    """Refuse a stream with an empty held-out half at a site: no SAE could be exported after the training. Collective.

    Raises:
        DataError: nothing of a half passes a site's filter.
    """
    for half in HALVES:
        n_kept = dict.fromkeys(stream.scalings, 0)
        for turn in rounds(stream.held_out.batches(half, max_tokens=ENOUGH_TOKENS, ranks=ranks), ranks):
            for site, rows in ({} if turn.batch is None else turn.batch.sites).items():
                n_kept[site] += len(rows.raw_ND)
        n_kept_of_ranks = ranks.gather_objects(n_kept)
        for site, scaling in stream.scalings.items():
            if not any(counts[site] for counts in n_kept_of_ranks):
                raise DataError(
                    f"held-out data: nothing of its {half} half passes the outlier filter of {site} (norms up to "
                    f"{scaling.limit:.3g}). Give other held-out text or rows."
                )
