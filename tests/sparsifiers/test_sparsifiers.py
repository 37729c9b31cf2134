"""What every registered sparsifier promises, and how Feature Choice splits its budget."""

import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_train.config import RunConfig
from sae_train.errors import ConfigError
from sae_train.ranks.interface import Ranks
from sae_train.sae.firing import Firing
from sae_train.sae.random import keyed_uniform
from sae_train.sae.state import State
from sae_train.sae.step_info import StepInfo
from sae_train.sae.zipf_budget import round_systematically, water_fill, zipf_mass
from sae_train.sparsifiers import SPARSIFIERS, Sparsifier, base, sparsifier_class
from sae_train.sparsifiers.allocator import Allocator
from sae_train.sparsifiers.feature_choice import FeatureChoice
from tools.grid_of_threads import on_ranks
from tools.sae_parts import selected, sparsifier_of
from tools.small_runs import CPU, kept_by_sorting, run_config

SMALL = settings(deadline=None, max_examples=25)
EVERY = [
    (name, "pooled")
    for name in SPARSIFIERS
    if issubclass(sparsifier_class(name), Allocator) and name != "feature_choice"
]
EVERY += [("feature_choice", "uniform"), ("feature_choice", "zipf")]
BY_TOKEN = ("topk", "gradient")
"""What keeps a whole number of matches a token."""
EVERY_SPARSIFIER = pytest.mark.parametrize(("name", "budget"), EVERY)


def info(step: int = 0, *, batch_tokens: int = 64, steps: int = 64, seed: int = 0) -> StepInfo:
    return StepInfo(
        step=step,
        tokens=step * batch_tokens,
        total_tokens=steps * batch_tokens,
        batch_tokens=batch_tokens,
        learning_rate=1e-3,
        seed=seed,
    )


def feature_choice_of(config: RunConfig, *, n_features: int) -> FeatureChoice:
    sparsifier = sparsifier_of(config, n_features=n_features)
    assert isinstance(sparsifier, FeatureChoice)
    return sparsifier


def affinities(n: int, f: int, *, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed)) + shift


@EVERY_SPARSIFIER
@SMALL
@given(n=st.integers(1, 40), f=st.integers(4, 64), share=st.floats(0.05, 1.0), shift=st.floats(-3, 2))
def test_never_above_k_and_met_where_affinities_are_there(
    name: str, budget: str, n: int, f: int, share: float, shift: float
) -> None:
    k = max(1.0, share * f)
    if name in BY_TOKEN:
        k = float(round(k))
    config = run_config(sparsifier=name, budget=budget, k=k, batch_tokens=n, tokens=64 * n)
    sparsifier = sparsifier_of(config, n_features=f)
    pre = affinities(n, f, seed=n * 100 + f, shift=shift)
    code = selected(sparsifier, pre, info(3, batch_tokens=n))
    assert len(code.value) == sparsifier.capacity == round(k * n)
    assert int(code.count) <= sparsifier.capacity
    dense = code.dense()
    kept = dense != 0
    assert torch.equal(dense[kept], pre[kept])
    assert bool((dense >= 0).all())
    if bool((pre > 0).all()):
        assert int(code.count) == sparsifier.capacity
    assert not code.value.requires_grad


@EVERY_SPARSIFIER
def test_no_positive_affinity_no_match(name: str, budget: str) -> None:
    sparsifier = sparsifier_of(run_config(sparsifier=name, budget=budget), n_features=32)
    code = selected(sparsifier, -affinities(64, 32).abs(), info())
    assert int(code.count) == 0
    assert not code.value.any()


@EVERY_SPARSIFIER
def test_same_pairs_on_two_ranks_and_no_global_randomness(name: str, budget: str) -> None:
    config = run_config(sparsifier=name, budget=budget, k=5)
    pre = affinities(64, 48, seed=9).mul(3).round()  # many ties
    before = torch.get_rng_state()
    whole = selected(sparsifier_of(config, n_features=48), pre, info(7)).dense()
    assert torch.equal(torch.get_rng_state(), before)

    def part(ranks: Ranks) -> Tensor:
        own = pre[ranks.rank * 32 : ranks.rank * 32 + 32]
        return selected(sparsifier_of(config, n_features=48), own, info(7), ranks=ranks).dense()

    assert torch.equal(torch.cat(on_ranks(2, part)), whole)


@EVERY_SPARSIFIER
def test_one_capacity_while_k_anneals(name: str, budget: str) -> None:
    config = run_config(sparsifier=name, budget=budget, k=4, start_k=12, anneal=0.5)
    sparsifier = sparsifier_of(config, n_features=40)
    pre = affinities(64, 40, shift=9.0)
    counts = []
    for step in (0, 16, 32, 63):
        code = selected(sparsifier, pre, info(step))
        assert len(code.value) == sparsifier.capacity == 12 * 64
        counts.append(int(code.count) / 64)
    assert counts == [12, 8, 4, 4]


def test_start_below_k_rises() -> None:
    sparsifier = sparsifier_of(run_config(k=8, start_k=2, anneal=1.0), n_features=40)
    assert [sparsifier.k_at(info(step)) for step in (0, 32, 64)] == [2, 5, 8]
    assert sparsifier.capacity == 8 * 64


@pytest.mark.parametrize("name", BY_TOKEN)
@pytest.mark.parametrize(("start_k", "k"), [(3, 5), (5, 3)])
def test_every_token_keeps_the_same_number_where_k_is_fractional_on_its_way(name: str, start_k: int, k: int) -> None:
    config = run_config(sparsifier=name, k=k, start_k=start_k, anneal=0.5)
    sparsifier = sparsifier_of(config, n_features=40)
    pre = affinities(64, 40, shift=9.0)
    by_k = {3.375: 3, 3.625: 4, 4.375: 4, 4.625: 5}
    for current, kept in by_k.items():
        when = info(int(32 * (current - start_k) / (k - start_k)))
        assert sparsifier.k_at(when) == current
        assert selected(sparsifier, pre, when).start.diff().tolist() == [kept] * 64


def test_mutual_choice_of_one_token_is_topk() -> None:
    pre, one = affinities(1, 50), info(batch_tokens=1)
    codes = [
        selected(sparsifier_of(run_config(sparsifier=name, k=6, batch_tokens=1), n_features=50), pre, one)
        for name in ("topk", "mutual_choice")
    ]
    for code in codes[1:]:
        assert torch.equal(code.dense(), codes[0].dense())


def test_uniform_feature_choice_is_topk_of_the_transpose() -> None:
    pre = affinities(64, 32, seed=4)
    columns = sparsifier_of(run_config(sparsifier="feature_choice", k=4), n_features=32)  # 8 a feature
    rows = sparsifier_of(run_config(sparsifier="topk", k=8, batch_tokens=32), n_features=64)
    by_columns = selected(columns, pre, info())
    by_rows = selected(rows, pre.t().contiguous(), info(batch_tokens=32))
    assert torch.equal(by_columns.dense(), by_rows.dense().t())


def test_selection_follows_a_permutation_of_tokens() -> None:
    pre = affinities(64, 32, seed=5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for name, budget in EVERY:
        sparsifier = sparsifier_of(run_config(sparsifier=name, budget=budget), n_features=32)
        plain, moved = selected(sparsifier, pre, info()).dense(), selected(sparsifier, pre[order], info()).dense()
        assert torch.equal(plain[order], moved), name


@SMALL
@given(
    f=st.integers(1, 300),
    exponent=st.floats(0, 2.5),
    shift=st.floats(0, 20),
    cap_share=st.floats(0, 1),
    floor_share=st.floats(0, 1),
    total=st.floats(0.5, 1e5),
)
def test_water_filling(
    f: int, exponent: float, shift: float, cap_share: float, floor_share: float, total: float
) -> None:
    """Within cap and floor, of the right sum, and proportional to the weights in between."""
    mass = zipf_mass(f, exponent=exponent, shift=shift)
    assert float(mass.sum()) == pytest.approx(1)
    even = total / f
    cap, floor = even * (1 + 5 * cap_share), even * floor_share
    shares = water_fill(mass, total=total, floor=floor, cap=cap)
    assert float(shares.sum()) == pytest.approx(total, rel=1e-9)
    assert bool((shares >= floor * (1 - 1e-9)).all())
    assert bool((shares <= cap * (1 + 1e-9)).all())
    assert bool((shares.diff() <= 1e-9 * total).all()), "descending like the weights"
    inside = (shares > floor * (1 + 1e-6)) & (shares < cap * (1 - 1e-6))
    ratio = (shares / mass)[inside]
    if len(ratio) > 1:
        assert float(ratio.max() / ratio.min()) == pytest.approx(1, rel=1e-6)


@SMALL
@given(f=st.integers(1, 200), total=st.integers(1, 3000), seed=st.integers(0, 10**9), step=st.integers(0, 10**6))
def test_systematic_rounding(f: int, total: int, seed: int, step: int) -> None:
    """floor(C_j + u) - floor(C_{j-1} + u), as exact fractions say, except where they tie; the sum is the budget."""
    weights = torch.rand(f, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1e-3
    shares = weights / weights.sum() * total
    u = keyed_uniform(seed, "test", step)
    assert 0 <= u < 1
    rounded = round_systematically(shares, total=total, u=u)
    assert int(rounded.sum()) == total
    assert bool((rounded >= shares.floor() - 1e-9).all())
    assert bool((rounded <= shares.ceil() + 1e-9).all())
    running = Fraction(0)
    for share, got in zip(shares.tolist()[:-1], rounded.tolist(), strict=False):
        low, running = running, running + Fraction(share)
        exact = (running + Fraction(u)).__floor__() - (low + Fraction(u)).__floor__()
        distance = min(abs(edge + Fraction(u) - round(edge + Fraction(u))) for edge in (low, running))
        assert got == exact or distance < 1e-9


@pytest.mark.parametrize("f", [3, 7, 49, 1000])
def test_rounded_sum_is_exact_at_the_ends_of_u(f: int) -> None:
    shares = torch.full((f,), 10 / f, dtype=torch.float64)  # sums to a little more or less than 10
    for u in (0.0, 1 - 2.0**-20):
        for total, scaled in ((10, shares), (10, shares * (1 - 1e-15)), (10, shares * (1 + 1e-15))):
            assert int(round_systematically(scaled, total=total, u=u).sum()) == 10


def test_rounding_is_right_on_average() -> None:
    config = run_config(sparsifier="feature_choice", budget="zipf", k=2, batch_tokens=64)
    sparsifier = feature_choice_of(config, n_features=100)
    pre = affinities(64, 100, shift=9.0)
    shares = sparsifier.shares(info())
    assert shares is not None
    counts = torch.stack([selected(sparsifier, pre, info(step)).firing_counts() for step in range(64)])
    assert bool((counts.sum(1) == 128).all())
    assert bool(((counts - shares * 64).abs() < 1).all())
    assert float((counts.double().mean(0) - shares * 64).abs().max()) < 0.2
    assert len({tuple(row.tolist()) for row in counts}) > 1, "another draw at another step"


def test_columns_keep_their_largest() -> None:
    sparsifier = sparsifier_of(run_config(sparsifier="feature_choice", budget="zipf", k=3), n_features=40)
    pre = affinities(64, 40, seed=2)
    code = selected(sparsifier, pre, info(5))
    counts = selected(sparsifier, affinities(64, 40, shift=9.0), info(5)).firing_counts()
    expected = kept_by_sorting(pre, group="column", budgets=counts.tolist())
    assert {(t, f) for t, f in (code.dense() > 0).nonzero().tolist()} == expected


@pytest.mark.parametrize("n_features", [64, 256, 1024])
def test_default_cap_and_floor(n_features: int) -> None:
    k, n = 8.0, 512
    config = run_config(sparsifier="feature_choice", budget="zipf", k=k, batch_tokens=n, shift=0.0, exponent=6.0)
    shares = feature_choice_of(config, n_features=n_features).shares(info(batch_tokens=n))
    assert shares is not None
    assert shares.dtype == torch.float64
    assert float(shares.sum()) == pytest.approx(k)
    assert float(shares.max()) == pytest.approx(min(1, max(0.10, 4 * k / n_features)))
    assert float(shares.min() * n) == pytest.approx(min(1, k * n / n_features))


def test_default_shift_is_a_share_of_the_width() -> None:
    wide = {"sparsifier": "feature_choice", "budget": "zipf", "k": 8, "batch_tokens": 4096, "tokens": 10**6}
    default = feature_choice_of(run_config(**wide), n_features=1000).shares(info(batch_tokens=4096))
    given_shift = feature_choice_of(run_config(**wide, shift=4.0), n_features=1000).shares(info(batch_tokens=4096))
    assert default is not None
    assert given_shift is not None
    assert torch.equal(default, given_shift)


def phased() -> tuple[RunConfig, FeatureChoice]:
    config = run_config(sparsifier="feature_choice", budget="zipf", after=0.5, k=4)
    return config, feature_choice_of(config, n_features=32)


def test_mutual_choice_phase_then_ranks_by_density() -> None:
    config, sparsifier = phased()
    mutual = sparsifier_of(run_config(k=4), n_features=32)
    pre = affinities(64, 32, seed=3)
    assert sparsifier.shares(info(31)) is None
    assert sparsifier.state().shared == {}
    assert torch.equal(selected(sparsifier, pre, info(31)).dense(), selected(mutual, pre, info(31)).dense())
    firing = Firing(32, half_life_tokens=100, device=CPU)
    firing.density_F = torch.linspace(0, 1, 32, dtype=torch.float64)
    firing.density_F[3:6] = 2.0  # a tie: the lower feature ranks first
    selected(sparsifier, pre, info(32), firing=firing)
    shares = sparsifier.shares(info(32))
    by_rank = feature_choice_of(replace(config, sparsifier=replace(config.sparsifier, after=0.0)), n_features=32)
    shares_by_rank = by_rank.shares(info(32))
    assert shares is not None
    assert shares_by_rank is not None
    order = [3, 4, 5, *range(31, 5, -1), 2, 1, 0]
    assert torch.equal(shares[order], shares_by_rank)
    firing.density_F = firing.density_F.flip(0)
    selected(sparsifier, pre, info(33), firing=firing)
    assert torch.equal(sparsifier.shares(info(33)), shares), "ranks stay"


def test_frozen_ranks_go_through_a_checkpoint() -> None:
    config, sparsifier = phased()
    firing = Firing(32, half_life_tokens=100, device=CPU)
    firing.density_F = torch.rand(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pre = affinities(64, 32, seed=3)
    selected(sparsifier, pre, info(32), firing=firing)
    resumed = sparsifier_of(config, n_features=32)
    resumed.load_state(State({name: value.clone() for name, value in sparsifier.state().shared.items()}, {}))
    codes = [selected(each, pre, info(40)).dense() for each in (sparsifier, resumed)]
    assert torch.equal(*codes)


def test_before_the_change_it_is_mutual_choice() -> None:
    config = run_config(sparsifier="feature_choice", after=0.99, k=4)
    sparsifier, mutual = feature_choice_of(config, n_features=32), sparsifier_of(run_config(k=4), n_features=32)
    pre = affinities(64, 32, seed=3)
    for step in (0, 63):
        assert torch.equal(selected(sparsifier, pre, info(step)).dense(), selected(mutual, pre, info(step)).dense())
    assert sparsifier.shares(info(63)) is None


@pytest.mark.parametrize(
    ("settings_", "wrong"),
    [({"cap": 0.01}, "cap"), ({"floor": 9.0}, "floor"), ({"floor": 9.0, "start_k": 2.0, "anneal": 0.1}, "floor")],
)
def test_infeasible_cap_or_floor_names_what_works(settings_: dict[str, float], wrong: str) -> None:
    budget = {"sparsifier": "feature_choice", "budget": "zipf", "k": 4}
    with pytest.raises(ConfigError, match=f"budget.{wrong}=") as caught:
        sparsifier_of(run_config(**budget, **settings_), n_features=32)
    nearest = float(str(caught.value).split()[-1].rstrip("."))
    sparsifier = feature_choice_of(run_config(**budget, **settings_ | {wrong: nearest}), n_features=32)
    assert sparsifier.shares(info()) is not None


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"k": 0.4, "sparsifier": "topk"}, "k=0.4: every token .* Nearest: 1"),
        ({"k": 4, "start_k": 0.004, "anneal": 0.5}, "k=0.004: leaves a batch"),
        ({"k": 0.004}, "k=0.004: leaves a batch"),
        ({"sparsifier": "mutual_chioce"}, "Did you mean 'mutual_choice'"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(dials: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sparsifier_of(run_config(**dials), n_features=32)


def test_the_table_of_the_interface_lists_every_member() -> None:
    members = {name for name in vars(Sparsifier) if not name.startswith("_")}
    assert members == set(re.findall(r"`(\w+)`", base.__doc__ or ""))
    assert len(members) <= 14
