"""The metrics of an evaluation."""

from sae_train.evaluation.decoder_cosine import DecoderCosine
from sae_train.evaluation.fidelity import Fidelity
from sae_train.evaluation.firing_density import FiringDensity
from sae_train.evaluation.l0 import L0
from sae_train.evaluation.language_model_loss import LanguageModelLoss
from sae_train.evaluation.metric import Metric

METRICS: tuple[type[Metric], ...] = (Fidelity, L0, FiringDensity, LanguageModelLoss, DecoderCosine)
"""The metrics in the order in which their figures stand in summary.json."""


def figures_in_rows() -> set[str]:
    """Return the names of the figures that rows of metrics.jsonl hold as `eval/NAME`."""
    return {name for metric in METRICS for name in metric.in_rows}
