"""Counters of firings against counting, over ranks and through a checkpoint."""

import pytest
import torch
from torch import Tensor

from sae_train import kernels
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.code import SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.state import State
from tools.grid_of_threads import on_ranks
from tools.small_runs import CPU


def code_of(fires_NF: Tensor, *, spare: int = 3) -> SparseCode:
    matches = kernels.select_batch(
        fires_NF.float(),
        budget=fires_NF.numel(),
        capacity=fires_NF.numel() + spare,
        n_features=fires_NF.shape[1],
        ranks=Solo(),
    )
    return SparseCode(**matches._asdict(), shape=(len(fires_NF),), n_features=fires_NF.shape[1])


def steps(n_steps: int = 6, n_tokens: int = 10, n_features: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0, 0.5, n_features)
    return [torch.rand(n_tokens, n_features, generator=generator) < rates for _ in range(n_steps)]


def counted(batches: list[Tensor], *, half_life: float = 1e9, ranks: Ranks | None = None) -> Firing:
    ranks = ranks or Solo()
    firing = Firing(batches[0].shape[1], half_life_tokens=half_life, device=CPU)
    for fires in batches:
        own = fires.chunk(ranks.size)[ranks.rank]
        firing.update(code_of(own), n_tokens=len(fires), ranks=ranks)
    return firing


def test_since_counts_tokens_of_whole_steps() -> None:
    batches = steps()
    firing = counted(batches)
    for feature in range(7):
        silent = [not bool(fires[:, feature].any()) for fires in reversed(batches)]
        quiet_steps = silent.index(False) if False in silent else len(silent)
        assert int(firing.since_F[feature]) == 10 * quiet_steps
    assert bool(firing.dead_F(60)[0])
    assert not firing.dead_F(61).any()
    assert torch.equal(firing.dead_F(10), firing.since_F >= 10)


def test_density_is_the_mean_and_forgets_by_half() -> None:
    batches = steps()
    everything = torch.cat(batches).double().mean(0)
    assert torch.allclose(counted(batches).density_F, everything, atol=1e-7)
    forgetful = counted(batches, half_life=10.0).density_F
    weights = torch.tensor([0.5 ** (5 - i) for i in range(6)], dtype=torch.float64)
    expected = sum(w * fires.double().mean(0) for w, fires in zip(weights, batches, strict=True)) / weights.sum()
    assert torch.allclose(forgetful, expected)
    assert forgetful.dtype == torch.float64


def test_interval_counts_since_the_last_log() -> None:
    batches = steps()
    firing = counted(batches[:2])
    firing.reset_interval()
    for fires in batches[2:]:
        firing.update(code_of(fires), n_tokens=10, ranks=Solo())
    assert torch.equal(firing.interval_F, torch.cat(batches[2:]).sum(0))
    assert firing.interval_tokens == 40


def test_a_match_of_value_zero_does_not_fire() -> None:
    fires = torch.ones(4, 3, dtype=torch.bool)
    code = code_of(fires)
    code.value[: int(code.count)] = 0
    firing = Firing(3, half_life_tokens=10, device=CPU)
    firing.update(code, n_tokens=4, ranks=Solo())
    assert firing.since_F.tolist() == [4, 4, 4]
    assert not firing.density_F.any()


@pytest.mark.parametrize("size", [2, 5])
def test_replicated_over_ranks(size: int) -> None:
    batches = steps()
    alone = counted(batches, half_life=25.0)
    for firing in on_ranks(size, lambda ranks: counted(batches, half_life=25.0, ranks=ranks)):
        for name, value in alone.state().features.items():
            assert torch.equal(firing.state().features[name], value), name


def test_state_goes_on_where_it_was() -> None:
    batches = steps()
    whole = counted(batches, half_life=25.0)
    first = counted(batches[:3], half_life=25.0)
    resumed = Firing(7, half_life_tokens=25.0, device=CPU)
    resumed.load_state(State(*({name: value.clone() for name, value in part.items()} for part in first.state())))
    for fires in batches[3:]:
        resumed.update(code_of(fires), n_tokens=10, ranks=Solo())
    for kind in ("shared", "features"):
        for name, value in getattr(whole.state(), kind).items():
            assert torch.equal(getattr(resumed.state(), kind)[name], value), name
