"""The loop of an evaluation: held-out batches through exported SAEs and their metrics."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evaluation.language_model import Baseline, baselines
from sae_train.evaluation.metric import EvaluationBatch, Metric, Subject
from sae_train.evaluation.registry import METRICS
from sae_train.evaluation.rounds import rounds
from sae_train.evaluation.sharded_forward import reconstruct
from sae_train.harvest.held_out import HeldOut, HeldOutBatch
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel


def evaluate_all(
    subjects: Sequence[Subject],
    held_out: HeldOut,
    *,
    max_tokens: int,
    language_model: "LanguageModel | None",
    ranks: Ranks,
    deal: Ranks | None = None,
    phases: Phases = SILENT,
) -> list[dict[str, Any]]:
    """Return the figures of all `METRICS` for each of this rank's SAEs (docs/metrics.md). Collective.

    A figure that is not defined is absent. All SAEs share a batch's clean forward pass, and those of one site share
    its zero-ablated pass. Each SAE has a spliced pass of its own.

    Args:
        subjects: the SAEs of which this rank holds features. The ranks of each SAE's grid give it in the same order.
            A rank may have none.
        held_out: the activations of all sites.
        max_tokens: held-out tokens to use, over all ranks.
        language_model: the model that reconstructions are spliced into. Without one, or without a loss, there are no
            CE and KL.
        ranks: all ranks, which go from batch to batch together.
        deal: the ranks that the batches are dealt to: `ranks`, the default, where each SAE is spread over all of them.
            `Solo` where each SAE lives on one rank, which then reads every batch.
        phases: receives the progress after each batch, on all ranks together. An error that it raises ends the
            evaluation.
    """
    model = language_model if language_model is not None and language_model.has_loss else None
    measured = [(subject, [metric(subject) for metric in METRICS]) for subject in subjects]
    batches = held_out.batches(
        "evaluation",
        max_tokens=max_tokens,
        ranks=deal or ranks,
        sites=list(dict.fromkeys(subject.site for subject in subjects)),
        with_logits=model is not None,
    )
    for turn in rounds(batches if subjects else iter(()), ranks, deal=deal):
        _update(measured, turn.batch, model)
        phases.meet(turn.n_tokens)
        del turn  # its logits would take memory while the next batch is read
    return [_joined(metric.figures(subject.ranks) for metric in metrics) for subject, metrics in measured]


def _update(
    measured: Iterable[tuple[Subject, list[Metric]]], held_out: HeldOutBatch | None, model: "LanguageModel | None"
) -> None:
    """Add a batch of this rank, or an empty one, to the metrics of every SAE."""
    batches = {} if held_out is None else _batches(held_out, model)
    for subject, metrics in measured:
        batch = batches.get(subject.site) or _empty_batch(subject)
        made = reconstruct(subject.sae, batch.raw_ND, n_features=subject.n_features, ranks=subject.ranks)
        for metric in metrics:
            metric.update(batch, made)


def _batches(held_out: HeldOutBatch, model: "LanguageModel | None") -> dict[str, EvaluationBatch]:
    """Return a batch at each site, with the language model's predictions where they can be made."""
    there: dict[str, Baseline] = {} if model is None or held_out.ids_BT is None else baselines(model, held_out)
    return {
        site: EvaluationBatch(raw_ND=rows.raw_ND, context_N=rows.context_N, baseline=there.get(site))
        for site, rows in held_out.sites.items()
    }


def _empty_batch(subject: Subject) -> EvaluationBatch:
    """Return the batch of a rank that has none left while others go on."""
    raw_ND = torch.zeros(0, subject.sae.d_model, device=subject.ranks.device)
    return EvaluationBatch(raw_ND=raw_ND, context_N=raw_ND.new_zeros(0, dtype=torch.int64), baseline=None)


def _joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return all figures in one dictionary."""
    return {name: value for part in parts for name, value in part.items()}
