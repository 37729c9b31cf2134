"""The fit of Zipf's law: what it recovers, what does not move it, where it says nothing, and how budgets use it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_train.config import RunConfig
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.firing import Firing
from sae_train.sae.state import State
from sae_train.sae.step_info import StepInfo
from sae_train.sae.zipf_budget import zipf_mass
from sae_train.sae.zipf_fit import BODY, HEAD, MOST_RANKS, fit_zipf
from sae_train.sparsifiers.feature_choice import FeatureChoice
from sae_train.training import restore
from tools import grid_world as world
from tools.grid_of_threads import on_grid
from tools.sae_parts import selected, sparsifier_of
from tools.small_runs import CPU, run_config

F, N = 97, 64
SMALL = settings(deadline=None, max_examples=25)
LAWS = {"exponent": st.floats(0.3, 2.5), "shift_share": st.floats(0, 0.3), "f": st.integers(64, 3000)}


@SMALL
@given(**LAWS, scale=st.floats(1e-4, 1e4))
def test_the_law_of_exact_densities_is_found(exponent: float, shift_share: float, f: int, scale: float) -> None:
    shift = shift_share * f
    fit = fit_zipf(scale * zipf_mass(f, exponent=exponent, shift=shift))
    assert fit is not None
    assert fit.exponent == pytest.approx(exponent, rel=1e-3)
    assert fit.shift == pytest.approx(shift, rel=1e-3, abs=1e-2)
    assert fit.r2 == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("f", [2 * MOST_RANKS, 50_000])
def test_some_ranks_stand_for_all_where_there_are_many(f: int) -> None:
    mass_F = zipf_mass(f, exponent=0.8, shift=0.01 * f)
    fit = fit_zipf(torch.poisson(200 * mass_F / mass_F[-1], generator=torch.Generator().manual_seed(0)))
    assert fit is not None
    assert fit.exponent == pytest.approx(0.8, abs=0.01)
    assert fit.shift == pytest.approx(0.01 * f, rel=0.05)


@settings(deadline=None, max_examples=10)
@given(exponent=st.floats(0.5, 1.3), shift_share=st.floats(0, 0.05), seed=st.integers(0, 2**31))
def test_the_law_of_counts_is_found(exponent: float, shift_share: float, seed: int) -> None:
    """2048 features, the rarest of which fires 50 times on average: counts of about 10k to 100k held-out tokens."""
    mass = zipf_mass(2048, exponent=exponent, shift=shift_share * 2048)
    counts = torch.poisson(50 * mass / mass[-1], generator=torch.Generator().manual_seed(seed))
    fit = fit_zipf(counts)
    assert fit is not None
    assert fit.exponent == pytest.approx(exponent, abs=0.05)
    assert fit.shift == pytest.approx(shift_share * 2048, rel=0.15, abs=20)  # a flat law hardly tells its shift
    law = zipf_mass(2048, exponent=fit.exponent, shift=fit.shift)
    assert float((law / mass - 1).abs()[20:1638].max()) < 0.15
    assert fit.r2 > 0.995


@SMALL
@given(**LAWS, seed=st.integers(0, 2**31))
def test_the_order_of_features_does_not_matter(exponent: float, shift_share: float, f: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    density = zipf_mass(f, exponent=exponent, shift=shift_share * f) * torch.rand(f, generator=generator)
    assert fit_zipf(density) == fit_zipf(density[torch.randperm(f, generator=generator)])


@SMALL
@given(**LAWS, seed=st.integers(0, 2**31))
def test_no_shift_does_better(exponent: float, shift_share: float, f: int, seed: int) -> None:
    """Beside weighted least squares, written out, on a fine grid of shifts."""
    noise = torch.randn(f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    density = zipf_mass(f, exponent=exponent, shift=shift_share * f) * (0.3 * noise).exp()
    ranked = density.sort(descending=True).values
    first, last = max(1, -int(-HEAD * f // 1)), int(BODY * f)
    y, root = ranked[first - 1 : last].log(), ranked[first - 1 : last].sqrt()
    rank = torch.arange(first, last + 1, dtype=torch.float64)
    mean = (root**2 @ y) / (root**2).sum()
    total = float((root * (y - mean)).square().sum())
    found = {}
    for shift in [0.0, *torch.logspace(-1, torch.tensor(float(f)).log10(), 200, dtype=torch.float64).tolist()]:
        columns = torch.stack([torch.ones_like(rank), -(rank + shift).log()], dim=1) * root[:, None]
        solution = torch.linalg.lstsq(columns, (root * y)[:, None]).solution
        residual = root * y - (columns @ solution).squeeze(1)
        found[1 - float(residual.square().sum()) / total] = float(solution[1])
    fit = fit_zipf(density)
    assert fit is not None
    assert fit.r2 >= max(found) - 1e-5
    if fit.r2 - max(found) < 1e-5:
        assert fit.exponent == pytest.approx(found[max(found)], rel=0.1)


def test_neither_the_densest_nor_the_rarest_nor_the_silent_move_it() -> None:
    density = zipf_mass(2000, exponent=0.8, shift=40.0)
    density[:19] *= 5
    density[1700:] /= 100
    there = fit_zipf(density)
    assert there is not None
    assert there.exponent == pytest.approx(0.8, rel=1e-3)
    assert there.shift == pytest.approx(40.0, rel=1e-2)
    # silent features take no rank; the shift may go further, and need not
    assert fit_zipf(torch.cat([density, torch.zeros(3000, dtype=torch.float64)])) == there


@pytest.mark.parametrize(
    "density",
    [torch.zeros(100), torch.tensor([0.1]), torch.zeros(0), torch.full((100,), 0.2), torch.linspace(0.1, 0.2, 9),
     torch.cat([torch.linspace(0.1, 0.2, 9), torch.zeros(500)])],
    ids=["none fired", "one feature", "no feature", "all equal", "nine", "nine of many"],
)  # fmt: skip
def test_too_little_says_nothing(density: Tensor) -> None:
    assert fit_zipf(density) is None


def test_what_falls_faster_than_any_power_has_its_shift_at_the_end_of_the_search() -> None:
    fit = fit_zipf(torch.exp(-torch.arange(200) / 20.0))
    assert fit is not None
    assert fit.shift == 200
    assert fit.exponent > 5


def info(step: int) -> StepInfo:
    return StepInfo(
        step=step, tokens=step * N, total_tokens=64 * N, batch_tokens=N, learning_rate=1e-3, seed=0
    )  # fmt: skip


def phased(**choices: object) -> FeatureChoice:
    """Feature Choice after half of the tokens."""
    budget: dict[str, object] = {"after": 0.5, "budget": "zipf", "exponent": None, "k": 4.0, "n_features": F} | choices
    return made(run_config(sparsifier="feature_choice", **budget))


def made(config: RunConfig) -> FeatureChoice:
    sparsifier = sparsifier_of(config, n_features=F)
    assert isinstance(sparsifier, FeatureChoice)
    return sparsifier


DENSITY = zipf_mass(F, exponent=0.7, shift=9.0)[torch.randperm(F, generator=torch.Generator().manual_seed(3))]


def change(sparsifier: FeatureChoice, ranks: Ranks, *, density: Tensor = DENSITY) -> Tensor:
    """Let the phases change where these are the densities; return the shares of all features."""
    lo, hi = ranks.features.slice(F)
    firing = Firing(hi - lo, half_life_tokens=1000, device=CPU)
    firing.density_F = density[lo:hi]
    first, last = ranks.data.slice(N)
    pre = torch.randn(N, F, generator=torch.Generator().manual_seed(0))[first:last, lo:hi]
    selected(sparsifier, pre, info(32), firing=firing, ranks=ranks)
    shares = sparsifier.shares(info(32))
    assert shares is not None
    return shares


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_the_fit_at_the_phase_change_is_the_same_on_every_rank(grid: tuple[int, int]) -> None:
    each_rank = [phased() for _ in range(grid[0] * grid[1])]
    shares = on_grid(grid, lambda ranks: change(each_rank[ranks.rank], ranks))
    fit = fit_zipf(DENSITY)
    assert fit is not None
    given = phased(exponent=fit.exponent, shift=fit.shift)
    expected = on_grid((1, 1), lambda ranks: change(given, ranks))[0]
    assert all(torch.equal(share, expected) for share in shares)
    assert {tuple(each._notes()["budget_law"].items()) for each in each_rank} == {tuple(fit._asdict().items())}
    assert given._notes() == {"budget_law": {"exponent": fit.exponent, "shift": fit.shift}}
    assert not torch.equal(expected, on_grid((1, 1), lambda ranks: change(phased(exponent=1.0), ranks))[0])


def test_what_was_fitted_goes_through_a_checkpoint() -> None:
    begun, resumed = phased(), phased()
    assert begun._notes() == begun.state().shared == {}
    (shares,) = on_grid((1, 1), lambda ranks: change(begun, ranks))
    resumed.load_state(State({name: value.clone() for name, value in begun.state().shared.items()}, {}))
    assert resumed._notes() == begun._notes()
    again = resumed.shares(info(32))
    assert again is not None
    assert torch.equal(again, shares)


@pytest.mark.parametrize(
    ("choices", "law"),
    [
        ({"exponent": 0.5}, {"exponent": 0.5, "shift": 0.004 * F}),
        ({"shift": 3.0}, {"exponent": 1.0, "shift": 3.0}),
        ({"exponent": 0.5, "shift": 3.0}, {"exponent": 0.5, "shift": 3.0}),
        ({"after": 0.0}, {"exponent": 1.0, "shift": 0.004 * F}),
    ],
)
def test_what_is_given_is_not_fitted(choices: dict[str, float], law: dict[str, float]) -> None:
    sparsifier = phased(**choices)
    on_grid((1, 1), lambda ranks: change(sparsifier, ranks))
    assert sparsifier._notes() == {"budget_law": law}


def test_a_run_goes_on_bit_for_bit_from_before_at_and_after_the_change(tmp_path: Path) -> None:
    world.write_activations(tmp_path / "rows")
    overrides = world.CASES["feature choice, zipf"]
    config = world.config_of(tmp_path / "rows", overrides, precision="float32")
    uninterrupted = world.learn(config, Solo())
    for steps in (24, 25, 26):  # the change is at the 26th
        world.save(config, Solo(), tmp_path / f"saved{steps}", steps=steps)
        saved = restore.load(tmp_path / f"saved{steps}" / f"step_{steps:08d}")
        (name,) = saved.sae_names()
        assert ("sparsifier/fit" in saved.sae_state(name, 0, F).shared) == (steps == 26)
        resumed = world.resume(config, Solo(), tmp_path / f"saved{steps}")
        for name, value in uninterrupted["weights"].items():
            assert torch.equal(value, resumed[name]), (steps, name)


def test_densities_without_a_law_leave_the_default() -> None:
    for density in (torch.zeros(F, dtype=torch.float64), torch.full((F,), 0.1, dtype=torch.float64)):
        sparsifier = phased()
        on_grid((1, 1), lambda ranks, s=sparsifier, d=density: change(s, ranks, density=d))
        assert sparsifier._notes() == {"budget_law": {"exponent": 1.0, "shift": 0.004 * F}}


def test_uniform_budgets_fit_nothing() -> None:
    config = run_config(sparsifier="feature_choice", after=0.5)
    sparsifier = made(replace(config, n_features=F))
    on_grid((1, 1), lambda ranks: change(sparsifier, ranks))
    assert sparsifier._notes() == {}
    assert set(sparsifier.state().shared) == {"rank"}
