"""Estimates of the floating-point operations of a run, for its plan."""

from dataclasses import dataclass

from sae_train.config import NoAuxLossConfig, SaeConfig, SourceConfig, TopKConfig
from sae_train.evaluation.language_model import passes_of_a_batch
from sae_train.harvest.build import StreamFacts
from sae_train.sparsifiers.topk import MULTIPLE

ENCODES_FOR_THRESHOLDS = 2
"""Encoder products of a held-out token that setting thresholds takes, about: one for a sample, one for the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutCost:
    """The cost of thresholds and evaluations of a run."""

    tokens: int
    """Tokens of each half, each time."""
    passes: int
    """Forward passes of the language model over an evaluated token. They are whole ones where there are several."""
    times: int
    """Number of evaluations."""
    operations: float
    """Floating-point operations of all of them, estimated."""


def step_operations(config: SaeConfig, source: SourceConfig, *, d_model: int, n_features: int) -> float:
    """Return the operations of an SAE's step for one token.

    They are the encoder product, and for each match its decoding, the gradient of its value and two weight gradients.
    Harvested gradients take a second product of the encoder's size.
    """
    k = config.usual_k
    if isinstance(config.sparsifier, TopKConfig) and config.sparsifier.multi_weight > 0:
        k *= 1 + MULTIPLE
    matches = k if isinstance(config.aux_loss, NoAuxLossConfig) else 2 * k  # a guess for the auxiliary loss
    products = 2 if source.reads_gradients else 1
    return 2 * products * d_model * n_features + 8 * d_model * matches


def held_out_cost(source: SourceConfig, facts: StreamFacts, *, n_features: int, total: int) -> HeldOutCost:
    """Return the estimated cost of thresholds and evaluations of an SAE in a run of `total` tokens."""
    tokens, encodes = source.held_out_tokens, 2 * facts.d_model * n_features
    whole_passes = passes_of_a_batch(n_sites=1, n_saes=1)
    passes = (whole_passes if facts.whole_flops_per_token else 1) if source.harvest.runs_model else 0
    whole = facts.whole_flops_per_token
    before_site = min(facts.flops_per_token, whole or facts.flops_per_token)  # with gradients the first has more in it
    evaluation = passes * whole or before_site
    every, batch = source.evaluate_every, source.batch_tokens
    times = 1 + (min((total - batch) // every, total // batch - 1) if every else 0)
    operations = times * tokens * (before_site + ENCODES_FOR_THRESHOLDS * encodes + evaluation + encodes)
    return HeldOutCost(tokens=tokens, passes=passes, times=times, operations=operations)
