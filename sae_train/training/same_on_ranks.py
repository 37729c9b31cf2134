"""Ranks with different settings, or with different data under the same name, are refused before they begin."""

from typing import Any

from sae_train.errors import ConfigError, DataError
from sae_train.ranks.interface import Ranks
from sae_train.training.plan import Plan


def check_same_settings(settings: dict[str, Any], plan: Plan, *, ranks: Ranks) -> None:
    """Refuse ranks with different settings: they would wait for each other in different places. Collective.

    Raises:
        ConfigError: on every rank.
    """
    facts = ranks.gather_objects((settings, plan.columns))
    for rank, other in enumerate(facts):
        if other[0] == facts[0][0] and other[1] != facts[0][1]:
            raise ConfigError(
                f"parallel={plan.layout}: rank {rank} would spread the features over {other[1]} ranks, and "
                f"rank 0 over {facts[0][1]}: their nodes have different numbers of ranks. Set parallel.feature_ranks."
            )
        if other != facts[0]:
            raise ConfigError(
                f"rank {rank} was given other settings than rank 0. Start all ranks with the same command."
            )


def check_same_source(record: dict[str, Any], fingerprint: list[int], *, ranks: Ranks) -> None:
    """Refuse ranks that see other data or another model under the same name, on disks of their own say. Collective.

    Raises:
        DataError: on every rank.
    """
    sources = ranks.gather_objects((record, fingerprint))
    for rank, source in enumerate(sources):
        if source != sources[0]:
            raise DataError(
                f"rank {rank} does not see the source of activations that rank 0 sees: files, text or model differ. "
                "Give all ranks the same one: absolute paths, on a file system that all nodes share."
            )
