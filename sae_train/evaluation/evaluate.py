"""The loop of an evaluation: held-out batches through an exported SAE and its metrics."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sae_train.evaluation.language_model import Baseline
from sae_train.evaluation.metric import EvaluationBatch, Subject
from sae_train.evaluation.registry import METRICS
from sae_train.evaluation.rounds import rounds
from sae_train.evaluation.sharded_forward import reconstruct
from sae_train.harvest.held_out import HeldOut, HeldOutBatch
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel


def evaluate(
    sae: SparseAutoencoder,
    held_out: HeldOut,
    *,
    max_tokens: int,
    language_model: "LanguageModel | None",
    n_features: int,
    ranks: Ranks,
    phases: Phases = SILENT,
) -> dict[str, Any]:
    """Return the figures of one SAE; see `evaluate_all`."""
    (figures,) = evaluate_all(
        [sae],
        held_out,
        max_tokens=max_tokens,
        language_model=language_model,
        n_features=n_features,
        ranks=ranks,
        phases=phases,
    )
    return figures


def evaluate_all(
    saes: Sequence[SparseAutoencoder],
    held_out: HeldOut,
    *,
    max_tokens: int,
    language_model: "LanguageModel | None",
    n_features: int,
    ranks: Ranks,
    phases: Phases = SILENT,
) -> list[dict[str, Any]]:
    """Return the figures of all `METRICS` for each SAE of one site (docs/metrics.md). Collective.

    A figure that is not defined is absent. All SAEs share a batch's clean and zero-ablated forward passes.

    Args:
        saes: this rank's features of each SAE.
        max_tokens: held-out tokens to use, over all ranks.
        language_model: the model that reconstructions are spliced into. Without one, or without a loss, there are no
            CE and KL.
        n_features: width of the whole dictionary.
        ranks: the grid.
        phases: receives the progress after each batch, on all ranks together. An error that it raises ends the
            evaluation.
    """
    model = language_model if language_model is not None and language_model.has_loss else None
    metrics = [[metric(subject) for metric in METRICS] for subject in _subjects(saes, n_features, ranks)]
    batches = held_out.batches("evaluation", max_tokens=max_tokens, with_logits=model is not None)
    for turn in rounds(batches, ranks):
        batch = _batch(turn.batch, model) or _empty_batch(saes[0].d_model, ranks)
        for sae, its_metrics in zip(saes, metrics, strict=True):
            made = reconstruct(sae, batch.raw_ND, n_features=n_features, ranks=ranks)
            for metric in its_metrics:
                metric.update(batch, made)
        phases.meet(turn.n_tokens)
    return [_joined(metric.figures(ranks) for metric in its_metrics) for its_metrics in metrics]


def _subjects(saes: Sequence[SparseAutoencoder], n_features: int, ranks: Ranks) -> list[Subject]:
    return [Subject(sae=sae, n_features=n_features, ranks=ranks) for sae in saes]


def _batch(held_out: HeldOutBatch | None, model: "LanguageModel | None") -> EvaluationBatch | None:
    """Return this rank's batch, with the language model's predictions where they can be made."""
    if held_out is None:
        return None
    baseline = None if model is None or held_out.ids_BT is None else Baseline(model, held_out)
    return EvaluationBatch(raw_ND=held_out.raw_ND, context_N=held_out.context_N, baseline=baseline)


def _empty_batch(d_model: int, ranks: Ranks) -> EvaluationBatch:
    """Return the batch of a rank that has none left while others go on."""
    raw_ND = torch.zeros(0, d_model, device=ranks.device)
    return EvaluationBatch(raw_ND=raw_ND, context_N=raw_ND.new_zeros(0, dtype=torch.int64), baseline=None)


def _joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return all figures in one dictionary."""
    return {name: value for part in parts for name, value in part.items()}
