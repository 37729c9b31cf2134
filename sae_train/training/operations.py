"""Estimates of the floating-point operations of a run, for its plan."""

from collections.abc import Iterable
from dataclasses import dataclass

from sae_train.config import NoAuxLossConfig, SourceConfig, TopKConfig
from sae_train.harvest.build import StreamFacts
from sae_train.sparsifiers.topk import MULTIPLE
from sae_train.training.sae_plan import SaePlan

CLEAN_PASSES = 1
"""Whole forward passes over an evaluated context that all SAEs share. Each site adds one, and so does each SAE."""

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


def step_operations(sae: SaePlan, source: SourceConfig) -> float:
    """Return the operations of an SAE's step for one token.

    They are the encoder product, and for each match its decoding, the gradient of its value and two weight gradients.
    Harvested gradients take a second product of the encoder's size.
    """
    config = sae.config
    k = config.usual_k
    if isinstance(config.sparsifier, TopKConfig) and config.sparsifier.multi_weight > 0:
        k *= 1 + MULTIPLE
    matches = k if isinstance(config.aux_loss, NoAuxLossConfig) else 2 * k  # a guess for the auxiliary loss
    products = 2 if source.reads_gradients else 1
    return 2 * products * sae.d_model * sae.n_features + 8 * sae.d_model * matches


def held_out_cost(source: SourceConfig, facts: StreamFacts, saes: Iterable[SaePlan], *, total: int) -> HeldOutCost:
    """Return the estimated cost of thresholds and evaluations of all SAEs in a run of `total` tokens."""
    tokens, saes = source.held_out_tokens, list(saes)
    encodes = sum(2 * sae.d_model * sae.n_features for sae in saes)
    whole = facts.whole_flops_per_token
    n_sites = len({sae.site for sae in saes})
    passes = (CLEAN_PASSES + n_sites + len(saes) if whole else 1) if source.harvest.runs_model else 0
    before_site = min(facts.flops_per_token, whole or facts.flops_per_token)  # with gradients the first has more in it
    evaluation = passes * whole or before_site
    every, batch = source.evaluate_every, source.batch_tokens
    times = 1 + (min((total - batch) // every, total // batch - 1) if every else 0)
    operations = times * tokens * (before_site + ENCODES_FOR_THRESHOLDS * encodes + evaluation + encodes)
    return HeldOutCost(tokens=tokens, passes=passes, times=times, operations=operations)
