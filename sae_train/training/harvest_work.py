"""Counts of the work of the harvest and of evaluations, for predictions of time."""

from collections.abc import Sequence

from sae_train.config import SourceConfig
from sae_train.harvest.build import StreamFacts
from sae_train.training.operations import ENCODES_FOR_THRESHOLDS
from sae_train.training.sae_plan import SaePlan
from sae_train.training.work import FLOAT, Work, encode_operations

WEIGHTS_OF_A_BLOCK = 12
"""Weights of a transformer's block, in d_model x d_model. The number of blocks follows from them, about."""
CALLS_OF_A_BLOCK = 30
PASSES = 4
"""Times that an output of a product is written or read by what follows it."""
POOL_PASSES = 10
"""Times that a row is read or written on its way: filter, conversion, pool, shuffle, scaling, sums for metrics."""
CALLS_OF_A_LANE = 10
ENCODES = ENCODES_FOR_THRESHOLDS + 1
"""Products of the encoder for a held-out token of either half: two for thresholds, one for figures."""


def model_precision(source: SourceConfig) -> str:
    """Return the precision of the language model's products, in the words of `precision`."""
    return "float32" if source.model.dtype == "float32" else "bf16"


def harvest_work(
    source: SourceConfig, facts: StreamFacts, *, widths: Sequence[int], n_tokens: float, n_ranks: int
) -> dict[str, Work]:
    """Return the work of a rank for the harvest of its part of a batch. Reading and tokenising text is not counted.

    Args:
        widths: d_model of each site.
        n_tokens: tokens that the rank harvests.
        n_ranks: ranks that share the lanes.
    """
    lanes = 1 if facts.sizes is None else facts.sizes.lanes / n_ranks
    numbers = n_tokens * sum(widths) * (2 if source.reads_gradients else 1)
    pools = Work(streamed=POOL_PASSES * FLOAT * numbers, calls=CALLS_OF_A_LANE * lanes * len(widths))
    if facts.sizes is None:
        return {"files": pools}
    forwards = n_tokens / facts.sizes.forward_tokens
    model = _passes(source, facts.flops_per_token, width=max(widths), n_tokens=n_tokens, forwards=forwards)
    return {"language model": model, "pools": pools}


def evaluation_work(
    source: SourceConfig, facts: StreamFacts, saes: Sequence[SaePlan], *, n_sites: int
) -> tuple[Work, Work]:
    """Return the work of one setting of thresholds and one evaluation: of the language model, and of the SAEs.

    The language model passes the calibration half once, up to the last site. It passes the other half as a whole: once
    for all SAEs, once for each site without it, and once for each SAE.
    """
    n_tokens = source.held_out_tokens
    encoders = Work()
    for sae in saes:
        entries = ENCODES * n_tokens * sae.n_features
        encoders += Work(
            operations=ENCODES * n_tokens * encode_operations(sae.sizes),
            scanned=2 * FLOAT * entries,
            gathered=FLOAT * n_tokens * sae.config.usual_k * sae.d_model,
        )
    if facts.sizes is None:
        return Work(), encoders
    width, forwards = max(sae.d_model for sae in saes), n_tokens / facts.sizes.forward_tokens
    whole = facts.whole_flops_per_token
    passes = 1 + n_sites + len(saes) if whole else 1
    before = _passes(source, facts.flops_per_token, width=width, n_tokens=n_tokens, forwards=forwards)
    after = _passes(source, whole or facts.flops_per_token, width=width, n_tokens=n_tokens, forwards=forwards)
    return before + after.times(passes), encoders


def _passes(source: SourceConfig, flops: float, *, width: int, n_tokens: float, forwards: float) -> Work:
    """Return the work of forward passes over `n_tokens` tokens.

    Args:
        flops: operations of the products with weights, for a token.
        width: d_model.
        forwards: number of passes.
    """
    element = 4 if source.model.dtype == "float32" else 2
    length = source.lane_sizes.context_length
    blocks = max(1.0, flops / (2 * WEIGHTS_OF_A_BLOCK * width**2))
    attention = blocks * 4 * length * width
    outputs = flops / (2 * width)
    return Work(
        operations=n_tokens * (flops + attention),
        streamed=element * (forwards * flops / 2 + PASSES * n_tokens * outputs),
        calls=CALLS_OF_A_BLOCK * blocks * forwards,
    )
