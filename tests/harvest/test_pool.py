"""Pools: nothing lost, nothing twice, refills at fixed points, bounded memory, exact state."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_train.harvest.batch import Batch
from sae_train.harvest.pool import LanePool

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(0, 20)).map(
    lambda t: {"share": t[0], "forward": t[1], "capacity": 2 * max(t[0], t[1]) + t[2]}
)


WIDTHS = {"here": 2, "there": 3}
"""Width of each site. Rows of the second are minus the rows of the first, so that mixed-up rows are seen."""


def rows_of(numbers: torch.Tensor, *, gradients: bool) -> dict[str, Batch]:
    """Return rows of every site for numbered tokens."""
    sign, found = 1.0, {}
    for site, width in WIDTHS.items():
        rows_ND = sign * numbers[:, None].repeat(1, width)
        found[site] = Batch(rows_ND, 10 * rows_ND if gradients else None)
        sign = -sign
    return found


class Source:
    """Numbered rows in blocks of varying size: what a lane's forward passes give."""

    def __init__(self, most: int, seed: int, *, gradients: bool = False) -> None:
        self.most, self.count, self.gradients = most, 0, gradients
        self._generator = torch.Generator().manual_seed(seed)

    def block(self) -> dict[str, Batch]:
        n = int(torch.randint(0, self.most + 1, (1,), generator=self._generator))
        rows = rows_of(torch.arange(self.count, self.count + n, dtype=torch.float32), gradients=self.gradients)
        self.count += n
        return rows


def empty(n: int, *, gradients: bool = False) -> dict[str, Batch]:
    return rows_of(torch.full((n,), float("nan")), gradients=gradients)


def pool_of(shape: dict[str, int], *, lane: int = 3, seed: int = 0, gradients: bool = False) -> LanePool:
    storage = empty(shape["capacity"], gradients=gradients)
    return LanePool(storage, lane=lane, share=shape["share"], forward_rows=shape["forward"], seed=seed)


def refill(pool: LanePool, source: Source) -> None:
    while pool.has_room:
        pool.add(source.block())
    pool.shuffle()


def taken_from(pool: LanePool, n: int, *, gradients: bool = False) -> list[float]:
    """Take a share; return its numbers, which are the same at every site and in the gradients."""
    out = empty(n, gradients=gradients)
    pool.take(out)
    numbers = out["here"].x_ND[:, 0]
    for site, expected in rows_of(numbers, gradients=gradients).items():
        assert torch.equal(out[site].x_ND, expected.x_ND)
        assert gradients == (out[site].gradient_ND is not None)
        if expected.gradient_ND is not None:
            assert torch.equal(out[site].gradient_ND, expected.gradient_ND)
    return numbers.tolist()


def next_share(pool: LanePool, source: Source, share: int) -> list[float]:
    if pool.is_due:
        refill(pool, source)
    return taken_from(pool, share, gradients=source.gradients)


@given(shape=SHAPES, steps=st.integers(1, 30), seed=st.integers(0, 99), gradients=st.booleans())
def test_every_row_comes_out_once(shape, steps, seed, gradients):
    pool, source = pool_of(shape, gradients=gradients), Source(shape["forward"], seed, gradients=gradients)
    taken = [row for _ in range(steps) for row in next_share(pool, source, shape["share"])]
    left = pool.state()["rows/here"][:, 0].tolist()
    assert Counter(taken + left) == Counter(float(row) for row in range(source.count))
    assert pool.taken == len(taken)
    assert len(left) == pool.unread <= shape["capacity"]


@given(
    shape=SHAPES, before=st.integers(0, 12), after=st.integers(1, 12), seed=st.integers(0, 99), gradients=st.booleans()
)
def test_its_unread_rows_are_its_checkpoint(shape, before, after, seed, gradients):
    def begun() -> tuple[LanePool, Source]:
        return pool_of(shape, gradients=gradients), Source(shape["forward"], seed, gradients=gradients)

    pool, source = begun()
    for _ in range(before):
        next_share(pool, source, shape["share"])
    state = pool.state()
    resumed, resumed_source = begun()
    while resumed_source.count < source.count:
        resumed_source.block()
    resumed_source._generator.set_state(source._generator.get_state())
    resumed.load_state(state)
    for _ in range(after):
        assert next_share(resumed, resumed_source, shape["share"]) == next_share(pool, source, shape["share"])


def test_refilled_when_less_than_half_is_unread_until_a_forward_pass_might_not_fit():
    pool, source = pool_of({"share": 4, "forward": 8, "capacity": 32}), Source(8, 0)
    assert pool.is_due
    refill(pool, source)
    assert 25 <= pool.unread <= 32
    while not pool.is_due:
        assert pool.unread >= 16
        pool.take(empty(4))
    assert 12 <= pool.unread < 16


def test_the_shuffle_is_keyed_by_seed_lane_and_refill():
    shape = {"share": 4, "forward": 8, "capacity": 32}

    def first(lane: int, seed: int, refills: int = 1) -> list[float]:
        pool = pool_of(shape, lane=lane, seed=seed)
        pool.add(rows_of(torch.arange(32.0), gradients=False))
        for _ in range(refills):
            pool.shuffle()
        return pool.state()["rows/here"][:, 0].tolist()

    orders = [first(0, 0), first(1, 0), first(0, 1), first(0, 0, refills=2), list(range(32))]
    assert len({tuple(order) for order in orders}) == 5
    assert [orders[0][int(place)] for place in orders[0]] != orders[3], "the second shuffle is not the first again"
    assert first(0, 0) == orders[0]


def test_a_pool_that_could_starve_is_our_fault_not_silent():
    with pytest.raises(AssertionError, match="check_stream"):
        pool_of({"share": 4, "forward": 20, "capacity": 32})


def test_what_is_taken_does_not_alias_the_pool():
    pool, source = pool_of({"share": 4, "forward": 8, "capacity": 32}), Source(8, 0)
    refill(pool, source)
    out = empty(4)
    pool.take(out)
    kept = {site: rows.map(torch.clone) for site, rows in out.items()}
    refill(pool, source)
    assert all(torch.equal(rows.x_ND, kept[site].x_ND) for site, rows in out.items())
