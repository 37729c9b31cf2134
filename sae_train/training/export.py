"""From trained weights to an exported SAE that keeps its promise: fold, calibrate, evaluate, write."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sae_train
from sae_train.config import RunConfig
from sae_train.errors import DataError
from sae_train.evaluation.evaluate import evaluate
from sae_train.evaluation.rounds import rounds
from sae_train.formats import native
from sae_train.harvest.build import Stream, StreamFacts
from sae_train.harvest.held_out import HALVES, Half
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.sae.calibration import calibrate
from sae_train.sae.nesting import prefix_sizes
from sae_train.training.trainer import Trainer

ENOUGH_TOKENS = 10_000
"""Held-out tokens that are looked at before training."""
SUMMARY_ONLY = ("l0_p5", "l0_p50", "l0_p95", "l0_standard_error", "evaluation_tokens", "density", "target_l0",
                "used_share", "ce", "correction", "budget_law")  # fmt: skip
"""Figures of summary.json that are not among the `eval/` names."""


def exported(trainer: Trainer, phases: Phases = SILENT) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Return the SAE as it would be exported now, and its figures on held-out data; changes nothing. Collective.

    The SAE holds this rank's features, the figures are of all. Thresholds are set on the calibration half, every figure
    comes from the other.
    """
    with trainer.stream.quiet():
        return _exported(trainer, phases)


def _exported(trainer: Trainer, phases: Phases) -> tuple[SparseAutoencoder, dict[str, Any]]:
    config, stream, ranks, n_features = trainer.config, trainer.stream, trainer.ranks, trainer.plan.n_features
    rule = trainer.sparsifier.export(trainer.dictionary, trainer.step_info())
    sae = SparseAutoencoder.fold(
        trainer.dictionary,
        centre_D=stream.scaling.centre_D,
        scale=stream.scaling.scale,
        k=0.0 if rule.k is None else rule.k,  # set below where there is none
        inference=rule.inference,
        encoder=(rule.W_enc, rule.b_enc),
    )
    max_tokens = config.held_out_tokens
    with _of_half(phases, "reading activations for thresholds", stream, "calibration", max_tokens=max_tokens):
        raw_ND = calibration_half(stream, max_tokens=max_tokens, phases=phases, ranks=ranks)
    calibration = calibrate(
        sae,
        raw_ND,
        k=rule.k,
        batch_tokens=trainer.plan.batch_tokens,
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


def evaluation_row(figures: dict[str, Any], *, step: int, tokens: int) -> dict[str, Any]:
    """Return the row of metrics.jsonl for an evaluation."""
    kept = {f"eval/{key}": value for key, value in figures.items() if key not in SUMMARY_ONLY}
    return {"step": step, "tokens": tokens} | kept


def write_export(
    sae: SparseAutoencoder,
    directory: Path,
    *,
    config: RunConfig,
    stream: Stream,
    facts: StreamFacts,
    figures: dict[str, Any],
    tokens: int,
    n_features: int,
    ranks: Ranks,
    phases: Phases = SILENT,
) -> None:
    """Write `saes/NAME/`. Collective: every rank brings its features, and learns whether it was written."""
    scaling = stream.scaling
    notes = {
        "site": facts.label,
        "source": facts.record,
        "tokens": tokens,
        "sparsifier": config.sparsifier.name,
        "prefixes": prefix_sizes(config.nesting, n_features=n_features),
        "seed": config.seed,
        "normalisation": {
            "scale": scaling.scale,
            "centre_norm": float(scaling.centre_D.norm()),
            "gamma": scaling.gamma,
            "outlier_limit": scaling.limit,
            "folded": True,
        },
        "figures": figures,
        "sae_train_version": sae_train.__version__,
    }
    with phases.of("exporting", total=native.size_of(sae.d_model, n_features), unit="B"):
        native.save(sae, directory, facts=notes, n_features=n_features, ranks=ranks, phases=phases)


def check_held_out(stream: Stream, *, ranks: Ranks) -> None:
    """Refuse a stream whose held-out halves keep nothing: all the training would be for a file that cannot be made.

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
    """Return the calibration half's raw activations [N, d_model], fp32, on every rank all of them in one order."""
    nothing_ND = torch.zeros(0, stream.d_model, device=ranks.device)
    turns = rounds(stream.held_out.batches("calibration", max_tokens=max_tokens), ranks)
    rows = [nothing_ND]
    for turn in turns:
        rows.append(ranks.gather_rows(nothing_ND if turn.batch is None else turn.batch.raw_ND))
        phases.meet(turn.n_tokens)
    return torch.cat(rows)
