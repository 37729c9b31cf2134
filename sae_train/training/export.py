"""From trained weights to an exported SAE that keeps its promise: fold, calibrate, evaluate, write."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import sae_train
from sae_train.config import SourceConfig
from sae_train.errors import DataError
from sae_train.evaluation.evaluate import evaluate
from sae_train.evaluation.registry import figures_in_rows
from sae_train.evaluation.rounds import rounds
from sae_train.formats import native
from sae_train.formats.manifest import ActivationSource, Normalisation, SaeManifest
from sae_train.harvest.build import Stream, StreamFacts
from sae_train.harvest.held_out import HALVES, Half
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.calibration import calibrate
from sae_train.training.learner import Learner
from sae_train.training.trainer import Trainer

ENOUGH_TOKENS = 10_000
"""Held-out tokens that are read before training."""


def exported(trainer: Trainer, learner: Learner, phases: Phases = SILENT) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Return an SAE as it would be exported now, and its figures on held-out data; change nothing. Collective.

    The SAE holds this rank's features, and the figures are of all features. Thresholds are set on the calibration half;
    every figure comes from the evaluation half.
    """
    with trainer.stream.quiet():
        return _exported(trainer, learner, phases)


def _exported(trainer: Trainer, learner: Learner, phases: Phases) -> tuple[SparseAutoencoder, dict[str, Any]]:
    stream, ranks, n_features = trainer.stream, trainer.ranks, learner.plan.n_features
    rule = learner.sparsifier.export(learner.dictionary, learner.step_info(trainer.n_done))
    sae = SparseAutoencoder.fold(
        learner.dictionary,
        centre_D=stream.scaling.centre_D,
        scale=stream.scaling.scale,
        k=0.0 if rule.k is None else rule.k,  # set below where there is none
        inference=rule.inference,
        encoder=(rule.W_enc, rule.b_enc),
    )
    max_tokens = trainer.source.held_out_tokens
    with _of_half(phases, "reading activations for thresholds", stream, "calibration", max_tokens=max_tokens):
        raw_ND = calibration_half(stream, max_tokens=max_tokens, phases=phases, ranks=ranks)
    calibration = calibrate(
        sae,
        raw_ND,
        k=rule.k,
        batch_tokens=learner.plan.batch_tokens,
        n_features=n_features,
        ranks=ranks,
        share_F=rule.share_F,
        learned_F=None if rule.threshold_F is None else rule.threshold_F.double() * stream.scaling.scale,
        phases=phases,
    )
    del raw_ND
    if rule.k is None:
        sae.k = calibration.target_l0
    sae.threshold.data.copy_(calibration.threshold_F)
    phases.meet()
    with _of_half(phases, "evaluating", stream, "evaluation", max_tokens=max_tokens):
        figures = evaluate(
            sae,
            stream.held_out,
            max_tokens=max_tokens,
            language_model=stream.language_model,
            n_features=n_features,
            ranks=ranks,
            phases=phases,
        )
    if "fvu" not in figures:
        raise DataError(
            "held-out data: its squared norms overflow or it is constant, so its FVU is not defined. Rescale the "
            "activations, or give other held-out data."
        )
    figures |= {"target_l0": calibration.target_l0, "used_share": calibration.used_share}
    if calibration.correction is not None:
        figures["correction"] = calibration.correction
    return sae, figures | rule.notes


def _of_half(phases: Phases, name: str, stream: Stream, half: Half, *, max_tokens: int) -> AbstractContextManager[None]:
    """Return a phase over a half of the held-out data."""
    return phases.of(name, total=stream.held_out.n_tokens(half, max_tokens=max_tokens))


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
    """Write `saes/NAME/`. Collective: every rank brings its features, and every rank raises if one cannot write."""
    config, stream, n_features = learner.config, trainer.stream, learner.plan.n_features
    manifest = SaeManifest(
        inference=sae.inference,
        k=sae.k,
        d_model=sae.d_model,
        n_features=n_features,
        site=facts.label,
        source=_activation_source(trainer.source, facts),
        tokens=trainer.tokens,
        sparsifier=config.sparsifier.name,
        prefixes=list(learner.prefixes),
        seed=config.seed,
        normalisation=Normalisation(
            scale=stream.scaling.scale,
            centre_norm=float(stream.scaling.centre_D.norm()),
            gamma=stream.scaling.gamma,
            outlier_limit=stream.scaling.limit,
            folded=True,
        ),
        figures=figures,
        sae_train_version=sae_train.__version__,
    )
    with phases.of("exporting", total=native.size_of(sae.d_model, n_features), unit="B"):
        native.save(sae, directory, manifest=manifest, ranks=trainer.ranks, phases=phases)


def _activation_source(config: SourceConfig, facts: StreamFacts) -> ActivationSource:
    """Return the origin of a run's activations: the stream's record, and the settings of a language model and text."""
    source = ActivationSource(**cast(dict[str, Any], facts.record))
    if not config.harvest.runs_model:
        return source
    return replace(
        source,
        dtype=config.model.dtype,
        context_length=config.live.context_length,
        subset=config.data.subset,
        split=config.data.split,
        text_column=config.data.text_column,
    )


def check_held_out(stream: Stream, *, ranks: Ranks) -> None:
    """Refuse a stream with an empty held-out half: no SAE could be exported after the training. Collective.

    Raises:
        DataError: nothing of a half passes the filters.
    """
    for half in HALVES:
        turns = rounds(stream.held_out.batches(half, max_tokens=ENOUGH_TOKENS), ranks)
        if not any(turn.n_tokens for turn in turns):
            raise DataError(
                f"held-out data: nothing of its {half} half passes the outlier filter (norms up to "
                f"{stream.scaling.limit:.3g}). Give other held-out text or rows."
            )


@torch.no_grad()
def calibration_half(stream: Stream, *, max_tokens: int, ranks: Ranks, phases: Phases = SILENT) -> Tensor:
    """Return the calibration half's raw activations [N, d_model], fp32, equal on every rank. Collective."""
    nothing_ND = torch.zeros(0, stream.d_model, device=ranks.device)
    turns = rounds(stream.held_out.batches("calibration", max_tokens=max_tokens), ranks)
    rows = [nothing_ND]
    for turn in turns:
        rows.append(ranks.gather_rows(nothing_ND if turn.batch is None else turn.batch.raw_ND))
        phases.meet(turn.n_tokens)
    return torch.cat(rows)
