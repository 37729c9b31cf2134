"""A row's figures against the same figures worked out from all tokens at once; and totals that survive a checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from sae_train.harvest.meter import Meter
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.code import SparseCode
from sae_train.sae.state import State
from sae_train.training.metrics import Totals
from sae_train.training.throughput import Throughput
from sae_train.training.tracking import MetricsFile
from tools.grid_of_threads import on_ranks


def random_code(n_tokens: int, n_features: int, *, seed: int, spare: int = 5) -> SparseCode:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n_tokens, n_features, generator=generator)
    dense = torch.where(torch.rand(dense.shape, generator=generator) < 0.3, dense + 0.1, torch.zeros(()))
    token, feature = dense.nonzero(as_tuple=True)
    pad = torch.zeros(spare, dtype=torch.int32)
    start = torch.cat([torch.zeros(1), (dense > 0).sum(1).cumsum(0)]).int()
    return SparseCode(
        value=torch.cat([dense[token, feature], torch.zeros(spare)]),
        feature=torch.cat([feature.int(), pad]),
        token=torch.cat([token.int(), pad]),
        start=start,
        shape=(n_tokens,),
        n_features=n_features,
    )


def add_step(totals: Totals, seed: int) -> tuple[torch.Tensor, torch.Tensor, SparseCode]:
    generator = torch.Generator().manual_seed(seed)
    x, error = torch.randn(20, 4, generator=generator) + 3, 0.1 * torch.randn(20, 4, generator=generator)
    code = random_code(20, 8, seed=seed)
    loss = error.square().sum() / 20
    totals.add(
        sum_D=x.sum(0, dtype=torch.float64),
        norm_N=x.norm(dim=1),
        missed_N=error.norm(dim=1),
        l0_N=code.start.diff().long(),
        code=code,
        loss=loss,
        aux=None,
        grad_norm=torch.tensor(2.0),
        budget=60.0,
    )
    return x, error, code


def test_row_is_over_all_tokens_of_the_interval() -> None:
    totals = Totals(d_model=4, ranks=Solo())
    steps = [add_step(totals, seed) for seed in range(3)]
    x, error = torch.cat([s[0] for s in steps]).double(), torch.cat([s[1] for s in steps]).double()
    l0 = torch.cat([(s[2].dense() > 0).sum(1) for s in steps])
    row = totals.row()
    assert row["train/fvu"] == pytest.approx(float(error.square().sum() / (x - x.mean(0)).square().sum()))
    assert row["train/l0"] == pytest.approx(float(l0.double().mean()))
    assert row["train/budget_used"] == pytest.approx(float(l0.sum()) / 180)
    assert row["train/grad_norm"] == 2.0
    assert row["train/threshold"] == pytest.approx(min(float(s[2].value[s[2].value > 0].min()) for s in steps))
    assert row["tokens_l0/p50"] == int(l0.sort().values[29])


def test_totals_go_through_a_checkpoint() -> None:
    totals, twin = Totals(d_model=4, ranks=Solo()), Totals(d_model=4, ranks=Solo())
    add_step(totals, 0)
    twin.load_state(State({k: v.clone() for k, v in totals.state().shared.items()}, {}))
    for each in (totals, twin):
        add_step(each, 1)
    assert totals.row() == twin.row()
    totals.reset()
    add_step(totals, 2)
    fresh = Totals(d_model=4, ranks=Solo())
    add_step(fresh, 2)
    assert totals.row() == fresh.row()


def test_figures_of_an_interval_that_began_on_two_ranks_and_ends_on_one() -> None:
    def begin(ranks: Ranks) -> State:
        totals = Totals(d_model=4, ranks=ranks)
        add_step(totals, ranks.rank)
        return totals.state()

    state = on_ranks(2, begin)[0]
    totals = Totals(d_model=4, ranks=Solo())
    totals.load_state(state)
    add_step(totals, 2)
    row = totals.row()
    assert row["train/grad_norm"] == pytest.approx(2.0)
    losses = [float(add_step(Totals(d_model=4, ranks=Solo()), seed)[1].square().sum() / 20)
              for seed in range(3)]  # fmt: skip
    assert row["train/loss"] == pytest.approx(sum(losses) / 2)  # two steps, of the first of which each rank had a part


@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("silent", [0, 2])
def test_code_round_trip_and_counts(spare: int, silent: int) -> None:
    """Where all slots are used and fire, and where not: a match of value 0 or less is none that fires."""
    code = random_code(7, 5, seed=3, spare=spare)
    code.value[:silent] *= -1
    dense = code.dense()
    assert torch.equal(code.firing_counts(), (dense > 0).sum(0))
    assert torch.equal(code.l0(), (dense > 0).sum(1).int())
    code.value[:silent] *= -1
    dense = code.dense()
    assert int(code.used().sum()) == int(code.count) == int((dense > 0).sum())


def test_metrics_file_keeps_whole_rows(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.keep_first(0)
    for step in range(4):
        file.append([{"step": step, "train/fvu": float("nan") if step == 2 else 0.5}])
    with file.path.open("a") as torn:
        torn.write('{"step": 4, "tra')  # a write cut in half by kill -9
    again = MetricsFile(tmp_path / "metrics.jsonl")
    again.keep_first(3)
    again.append([{"step": 3}])
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["train/fvu"] is None
    assert "train/fvu" not in rows[3]


def test_a_row_cut_in_half_is_dropped_wherever_it_stands(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.path.write_bytes(b'{"step": 0}\n{"st')
    file.keep_first(5)
    file.append([{"step": 1}])
    assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [0, 1]


def test_speeds_count_what_came_before_a_resume_in_the_summary_alone() -> None:
    first, second = Meter(), Meter()
    before = Throughput(first, ranks=Solo())
    with first.timed("trained", 100):
        pass
    first.seconds["trained"] = 10.0
    assert before.row() == {"perf/trained_tokens_per_second": 10.0}
    assert before.row() == {}
    after = Throughput(second, ranks=Solo())
    after.load_totals(before.totals().tolist())
    second.count("trained", 300)
    second.seconds["trained"] = 10.0
    assert after.row() == {"perf/trained_tokens_per_second": 30.0}
    assert after.summary() == {"trained": 20.0, "slowest": "trained"}
