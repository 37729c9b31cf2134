"""Ranks with different settings or sources all fail with a message, before any waits for another."""

import dataclasses
from typing import Any

import pytest

from sae_train.config import as_dict
from sae_train.errors import ConfigError, DataError
from sae_train.harvest.build import StreamFacts
from sae_train.harvest.stream import StreamSite
from sae_train.ranks.interface import Ranks
from sae_train.training.run import plan_of
from sae_train.training.same_on_ranks import check_same_settings, check_same_source
from tools.grid_of_threads import on_ranks
from tools.small_runs import run_config

SITE = StreamSite(label="tensors", d_model=16, layer=None, record={})
FACTS = StreamFacts(sites=(SITE,), name="tensors", pool_bytes=0, flops_per_token=0, record={})


def said(*given: dict[str, Any]) -> list[str]:
    """Return the message of each rank, given its settings and `columns`."""

    def one(ranks: Ranks) -> str:
        settings = dict(given[ranks.rank])
        columns = settings.pop("columns", 1)
        plan = dataclasses.replace(plan_of(run_config(), FACTS, n_ranks=ranks.size), columns=columns)
        try:
            check_same_settings(as_dict(run_config(**settings), [run_config(**settings).sae]), plan, ranks=ranks)
        except ConfigError as error:
            return str(error)
        return ""

    return on_ranks(len(given), one)


def test_ranks_that_were_started_alike_pass() -> None:
    assert said({}, {}, {}) == [""] * 3


@pytest.mark.parametrize("other", [{"k": 5.0}, {"log_every": 2048}, {"runs": "elsewhere"}])
def test_other_settings_are_refused_on_every_rank(other: dict[str, Any]) -> None:
    """A setting outside of the run's identity counts, too: ranks that log at different steps wait for ever."""
    expected = "rank 2 was given other settings than rank 0. Start all ranks with the same command."
    assert said({}, {}, other) == [expected] * 3


def test_nodes_of_different_sizes_are_refused_on_every_rank() -> None:
    messages = said({"columns": 2}, {"columns": 2}, {"columns": 1})
    assert len(set(messages)) == 1
    assert "rank 2 would spread the features over 1 ranks, and rank 0 over 2" in messages[0]
    assert "Set parallel.feature_ranks." in messages[0]


@pytest.mark.parametrize("other", [({"rows": 5}, [4, 7]), ({"rows": 4}, [4, 8])])
def test_ranks_that_read_something_else_are_refused_on_every_rank(other: tuple[dict[str, Any], list[int]]) -> None:
    """A relative path on nodes with their own disks would mean training on a mixture."""

    def one(ranks: Ranks) -> str:
        record, numbers = other if ranks.rank == 1 else ({"rows": 4}, [4, 7])
        try:
            check_same_source(record, numbers, ranks=ranks)
        except DataError as error:
            return str(error)
        return ""

    messages = on_ranks(3, one)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 1 does not see the source of activations that rank 0 sees")
