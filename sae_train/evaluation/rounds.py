"""Held-out batches in rounds: in each round every rank brings its next batch, or none."""

from collections.abc import Iterator
from typing import NamedTuple

from sae_train.errors import UserError
from sae_train.harvest.held_out import HeldOutBatch
from sae_train.ranks.interface import Ranks


class Round(NamedTuple):
    """One batch of every rank. `rounds` creates it; evaluation and calibration read it."""

    batch: HeldOutBatch | None
    """This rank's batch; None where it has no more."""
    n_tokens: int
    """Kept tokens of all ranks' batches."""


def rounds(batches: Iterator[HeldOutBatch], ranks: Ranks) -> Iterator[Round]:
    """Yield rounds until no rank has a batch left, equally many on every rank. Host side: not for a training step.

    Raises:
        UserError: a rank's batch could not be read; on every rank.
    """
    while True:
        batch, problem = None, None
        try:
            batch = next(batches, None)
        except UserError as error:
            problem = error
        ranks.raise_together(problem)
        counts = ranks.gather_objects(None if batch is None else len(batch.raw_ND))
        there = [count for count in counts if count is not None]
        if not there:
            return
        yield Round(batch, sum(there))
