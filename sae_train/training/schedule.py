"""The learning rate, and the times at which things are due, as functions of the tokens trained on."""

import math

from sae_train.config import OptimizerConfig

WARMUP_SHARE = 0.05
DECAY_SHARE = 0.2
ENOUGH_FIRINGS = 4000
"""Firings a feature on average from which on the learning rate does not depend on them."""


def learning_rate(
    tokens: int, *, peak: float, batch_tokens: int, warmup_tokens: int, decay_tokens: int, total_tokens: int
) -> float:
    """Return the learning rate of the step that starts after `tokens` tokens.

    It rises linearly to `peak` over `warmup_tokens`, stays, and falls linearly to 0 over the last `decay_tokens`. The
    rise counts tokens at the step's end, so that no step is wasted on a rate of 0. The fall counts them at its start.
    """
    rate = peak
    if tokens + batch_tokens < warmup_tokens:
        rate *= (tokens + batch_tokens) / warmup_tokens
    left = total_tokens - tokens
    if left < decay_tokens:
        rate *= left / decay_tokens
    return rate


def peak_learning_rate(config: OptimizerConfig, *, n_features: int, tokens: int, k: float) -> float:
    """Return `optimizer.lr`, or 1.7e-3 sqrt(2^14 / F) (10^6 / tokens)^0.35 max(1, 4000 / n)^0.35 within [5e-5, 1.5e-2].

    F is n_features, and n = tokens k / F is the mean number of firings of a feature. A feature that fires seldom gets
    few updates, and most such features stay dead at a lower rate. The root in width is the rule that libraries take
    from Gao et al. 2024 (arXiv 2406.04093). The level is 3e-3 at 820k tokens and 6144 features, where 5e-3 left 10%
    dead. The power of tokens joins it to these libraries' 2e-4 for runs of some 300M tokens (docs/reports/quality.md).
    """
    if config.lr is not None:
        return config.lr
    rate: float = 1.7e-3 * math.sqrt(2**14 / n_features) * (1e6 / tokens) ** 0.35
    rate *= max(1.0, ENOUGH_FIRINGS * n_features / (tokens * k)) ** 0.35
    return min(max(rate, 5e-5), 1.5e-2)


def is_due(every: int, *, before: int, after: int) -> bool:
    """Return whether a multiple of `every` tokens lies in (before, after]; `every` 0 is never due."""
    return every > 0 and after // every > before // every
