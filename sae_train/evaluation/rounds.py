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
    """Kept tokens of the batches that were read, for the progress. A batch that several ranks read counts once."""


def rounds(batches: Iterator[HeldOutBatch], ranks: Ranks, *, deal: Ranks | None = None) -> Iterator[Round]:
    """Yield rounds until no rank has a batch left, equally many on every rank. Host side: not for a training step.

    Args:
        batches: this rank's batches. It may have none.
        ranks: all ranks, which go through the rounds together.
        deal: the ranks that the batches are dealt to, see `HeldOut.batches`. None: `ranks`.

    Raises:
        UserError: a rank's batch could not be read; on every rank.
    """
    are_dealt = deal is None or deal.size == ranks.size
    while True:
        batch, problem = None, None
        try:
            batch = next(batches, None)
        except UserError as error:
            problem = error
        ranks.raise_together(problem)
        counts = ranks.gather_objects(None if batch is None else _kept(batch))
        there = [count for count in counts if count is not None]
        if not there:
            return
        yield Round(batch, sum(there) if are_dealt else max(there))


def _kept(batch: HeldOutBatch) -> int:
    """Return the kept tokens of a batch, at the site that keeps most."""
    return max((len(rows.raw_ND) for rows in batch.sites.values()), default=0)
