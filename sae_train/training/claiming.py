"""A run's directory is claimed on the first rank, for all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sae_train.errors import CheckpointError, UserError
from sae_train.ranks.interface import Ranks
from sae_train.training.run_directory import RunDirectory
from sae_train.training.together import on_first


def claim_on_first(
    directory: RunDirectory, config: dict[str, Any], *, identity: dict[str, Any], record: dict[str, Any], ranks: Ranks
) -> None:
    """Claim a directory on the first rank, and check that every rank sees it. Collective; see `RunDirectory.claim`.

    Raises:
        CheckpointError: on every rank.
    """
    on_first(lambda: directory.claim(config, identity=identity, record=record), ranks=ranks)
    if not all(ranks.gather_objects(directory.is_seen())):
        raise CheckpointError(
            f"{directory.path}: some ranks do not see what the first one wrote there. Put runs=DIR on a file system "
            "that all nodes share."
        )


@contextmanager
def abandoned_if_refused(directory: RunDirectory, *, ranks: Ranks) -> Iterator[None]:
    """Remove a new run's files where the block raises a UserError: the run has not begun."""
    try:
        yield
    except UserError:
        if ranks.is_first:
            directory.abandon()
        raise
