"""The sizes of a live harvest: lanes, contexts in a forward pass, and pools.

A size that is null follows from `batch_tokens`, `context_length` and the typed sizes, never from the number of ranks.
"""

from dataclasses import dataclass

from sae_train.config.harvest import LiveHarvestConfig

MOST_LANES = 64
USUAL_CONTEXTS = 8
"""Contexts in a forward pass where the pool has room for twice as many."""
USUAL_POOL_BATCHES = 64
FORWARDS_A_POOL = 2
"""Smallest size of a lane's pool in forward passes: a pool is refilled when it is half empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSizes:
    """The sizes of a live harvest without any null. `lane_sizes` creates it; harvest, plan and checks read it."""

    lanes: int
    """Independent readers of the text."""
    share: int
    """Tokens that each lane gives to a batch."""
    context_length: int
    """Tokens a context."""
    contexts_per_forward: int
    """Contexts of one lane in a forward pass."""
    pool_batches: int
    """Size of all pools together, in batches."""

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.contexts_per_forward * self.context_length

    @property
    def capacity(self) -> int:
        """Tokens that one lane's pool holds."""
        return self.pool_batches * self.share


def lane_sizes(harvest: LiveHarvestConfig, *, batch_tokens: int) -> LaneSizes:
    """Return the typed sizes, with those that are null set by these rules.

    - Lanes: the largest divisor of `batch_tokens` up to 64, or fewer where a typed pool would not hold two forward
      passes.
    - Contexts in a forward pass: 1 to 8, as many as fit twice into a lane's pool of 64 batches (or of the typed size).
    - Pools: 64 batches, or two forward passes of each lane if that is more.
    """
    contexts, pool, length = harvest.contexts_per_forward, harvest.pool_batches, harvest.context_length
    if harvest.lanes is not None:
        lanes = harvest.lanes
    else:
        divisors = [n for n in range(1, min(MOST_LANES, batch_tokens) + 1) if batch_tokens % n == 0]
        needed = FORWARDS_A_POOL * length * (contexts or 1)
        fits = [n for n in divisors if pool is None or pool * (batch_tokens // n) >= needed]
        lanes = max(fits, default=1)
    share = batch_tokens // lanes
    if contexts is None:
        fit = (pool or USUAL_POOL_BATCHES) * share // (FORWARDS_A_POOL * length)
        contexts = max(1, min(USUAL_CONTEXTS, fit))
    if pool is None:
        pool = max(USUAL_POOL_BATCHES, -(-FORWARDS_A_POOL * contexts * length // share))
    return LaneSizes(lanes=lanes, share=share, context_length=length, contexts_per_forward=contexts, pool_batches=pool)


def lane_problems(harvest: LiveHarvestConfig, *, batch_tokens: int) -> list[str]:
    """Return a problem for each contradiction between typed sizes, with the nearest values that fit."""
    lanes = harvest.lanes
    if lanes is not None and batch_tokens % lanes:
        nearest = sorted({max(1, batch_tokens // lanes) * lanes, (batch_tokens // lanes + 1) * lanes})
        return [
            f"batch_tokens={batch_tokens} over harvest.lanes={lanes}: not divisible. "
            f"Nearest batch_tokens: {' or '.join(map(str, nearest))}. harvest.lanes=null takes the largest divisor up "
            f"to {MOST_LANES}."
        ]
    sizes = lane_sizes(harvest, batch_tokens=batch_tokens)
    needed = FORWARDS_A_POOL * sizes.forward_tokens
    if needed > sizes.capacity:
        ways = [f"raise harvest.pool_batches to {-(-needed // sizes.share)}"]
        fewer = sizes.capacity // (FORWARDS_A_POOL * sizes.context_length)
        if fewer:
            ways.insert(0, f"lower harvest.contexts_per_forward to {fewer}")
        advice = ", or ".join(ways)
        return [
            f"harvest.pool_batches={sizes.pool_batches}: a lane's pool holds {sizes.capacity} tokens, and half of it "
            f"must hold one forward pass of {sizes.forward_tokens} (contexts_per_forward x context_length). "
            f"{advice[0].upper()}{advice[1:]}; null chooses it."
        ]
    if harvest.prefetch is not None and harvest.prefetch > sizes.pool_batches:
        return [
            f"harvest.prefetch={harvest.prefetch}: a pool of harvest.pool_batches={sizes.pool_batches} never takes as "
            "many, so the rest would change nothing. Lower it."
        ]
    return []
