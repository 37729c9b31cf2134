"""Rows over an outlier limit: the next kept row of the same forward pass takes their place, as a slow loop finds it."""

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae_train.errors import DataError
from sae_train.harvest.batch import Batch
from sae_train.harvest.filter import next_kept
from sae_train.harvest.live_lane import Kept, LiveLane
from sae_train.harvest.meter import Meter
from sae_train.harvest.pool import LanePool
from sae_train.harvest.raw_rows import Block
from sae_train.harvest.scaling import Scaling

D, LIMIT = 3, 10.0


class Text:
    """A lane's text without any."""

    lane, has_ended = 5, False

    def cursor(self) -> dict[str, Tensor]:
        return {}

    def go_to(self, cursor: dict[str, Tensor]) -> None: ...


def lane_of(*sites: str, gradients: bool = False) -> LiveLane:
    storage = {site: Batch(torch.zeros(96, D), torch.zeros(96, D) if gradients else None) for site in sites}
    pool = LanePool(storage, lane=5, share=8, forward_rows=30, seed=0)
    return LiveLane(cast(Any, Text()), pool, meter=Meter())


def scaling(limit: float = LIMIT) -> Scaling:
    return Scaling(centre_D=torch.ones(D).double(), scale=2.0, limit=limit, gamma=1.0, gradient_scale=3.0)


def rows_with(over: list[bool], seed: int) -> Tensor:
    """Return rows of norms below the limit, or above it where told."""
    rows_ND = torch.nn.functional.normalize(torch.randn(len(over), D, generator=torch.Generator().manual_seed(seed)))
    return rows_ND * torch.where(torch.tensor(over, dtype=torch.bool), 3.0, 0.5)[:, None] * LIMIT


def expected(over: list[bool]) -> list[int]:
    """Return the row that each row is replaced by: the first one at or after it, round the end, that is not over."""
    found = []
    for row in range(len(over)):
        while over[row]:
            row = (row + 1) % len(over)
        found.append(row)
    return found


MASKS = st.lists(st.booleans(), min_size=1, max_size=30)


@given(over=MASKS.filter(lambda over: not all(over)))
def test_the_next_kept_row_is_found_as_by_a_loop(over: list[bool]) -> None:
    assert next_kept(~torch.tensor(over)).tolist() == expected(over)


@given(masks=MASKS.flatmap(lambda one: st.tuples(st.just(one), st.lists(st.booleans(), min_size=len(one),
       max_size=len(one)))), seed=st.integers(0, 99), gradients=st.booleans())  # fmt: skip
def test_each_site_replaces_its_own_rows_with_their_gradients(
    masks: tuple[list[bool], list[bool]], seed: int, gradients: bool
) -> None:
    sites = ("here", "there")
    raw = {site: rows_with(over, seed + place) for place, (site, over) in enumerate(zip(sites, masks, strict=True))}
    slopes = {site: 7 * rows_ND for site, rows_ND in raw.items()} if gradients else {}
    kept = lane_of(*sites, gradients=gradients).keep(
        Block(raw, slopes, {}, False), dict.fromkeys(sites, scaling()), torch.float32
    )
    assert len(kept) == len(masks[0])
    for site, over in zip(sites, masks, strict=True):
        assert kept.n_over[site] == sum(over)
        if all(over):
            source_ND, slope_ND = raw[site] * (LIMIT / raw[site].norm(dim=1, keepdim=True)), 7 * raw[site]
        else:
            source_ND = raw[site][expected(over)]
            slope_ND = 7 * source_ND
        assert torch.allclose(kept.rows[site].x_ND, (source_ND - 1) / 2, atol=1e-5)
        found_ND = kept.rows[site].gradient_ND
        assert (found_ND is not None) == gradients
        if found_ND is not None:
            assert torch.allclose(found_ND, slope_ND / 3, atol=1e-4)


def test_counts_are_of_rows_in_the_pool_by_site() -> None:
    lane = lane_of("here", "there")
    rows = {"here": rows_with([True, False, True], 0), "there": rows_with([False] * 3, 1)}
    kept = lane.keep(Block(rows, {}, {}, False), dict.fromkeys(rows, scaling()), torch.float32)
    for n in (1, 2):
        lane.absorb(kept)
        assert (lane.seen, lane.dropped) == (3 * n, {"here": 2 * n, "there": 0})
    again = lane_of("here", "there")
    again.load_state(lane.state())
    assert (again.seen, again.dropped, again.pool.unread) == (6, {"here": 4, "there": 0}, 6)


def test_a_site_without_rows_within_its_limit_ends_the_run_after_200_forward_passes() -> None:
    lane = lane_of("here", "there")

    def kept(limit: float) -> Kept:
        rows = dict.fromkeys(("here", "there"), rows_with([False, False], 0))
        return lane.keep(Block(rows, {}, {}, False), {"here": scaling(), "there": scaling(limit)}, torch.float32)

    for limit in [0.1] * 199 + [LIMIT] + [0.1] * 199:
        assert len(kept(limit)) == 2
    with pytest.raises(DataError, match="lane 5, there: 200 forward passes in a row gave no activation"):
        kept(0.1)
