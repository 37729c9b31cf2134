"""Predicted times grow as the run does, and the real command line prints them."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sae_train.cli.compose import compose_config
from sae_train.config import AuxKConfig, NoAuxLossConfig, ParallelConfig, TopKConfig
from sae_train.errors import ConfigError
from sae_train.harvest.build import check_stream
from sae_train.sparsifiers import SPARSIFIERS
from sae_train.training.hardware import Hardware, hardware_table
from sae_train.training.holdings import MemoryModel
from sae_train.training.memory import needed_bytes
from sae_train.training.plan import Plan
from sae_train.training.plan_text import describe
from sae_train.training.prediction import Prediction, predict
from sae_train.training.run import plan_of
from sae_train.training.sae_plan import SaePlan
from tools.command_line import Command
from tools.tiny_runs import tiny_run

TABLE = hardware_table()
MACHINES = ("h100", "cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for width in (16, 32):
        (folder / str(width)).mkdir()
        save_file({"activations": torch.randn(8192, width)}, folder / str(width) / "rows.safetensors")
    return folder


@pytest.fixture(scope="module")
def predicted(rows: Path) -> Callable[..., Prediction]:
    base = {
        name: compose_config(["harvest=tensors", f"harvest.path={rows / '32'}", "tracking=none", f"sparsifier={name}",
                              "tokens=51200", "batch_tokens=512", "n_features=4096", "k=8"])
        for name in SPARSIFIERS if name != "gradient"
    }  # fmt: skip

    def of(
        hardware: Hardware, named: str = "mutual_choice", *, width: int = 32, n_ranks: int = 1, **dials: Any
    ) -> Prediction:
        config = base[named]
        config = replace(config, harvest=replace(config.harvest, path=str(rows / str(width))), **dials)
        facts = check_stream(config.source, n_ranks=n_ranks)
        return predict(plan_of(config, facts, n_ranks=n_ranks, hardware=hardware), config.source, facts, hardware)

    return of


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("sparsifier", [name for name in SPARSIFIERS if name != "gradient"])
def test_a_larger_run_takes_longer(predicted: Callable[..., Prediction], machine: str, sparsifier: str) -> None:
    hardware = replace(TABLE[machine], call=1e-12)
    base = predicted(hardware, sparsifier)
    assert 0 < base.step_seconds < 60
    for dials in ({"n_features": 8192}, {"k": 16.0}, {"batch_tokens": 1024}):
        assert predicted(hardware, sparsifier, **dials).training_seconds > base.training_seconds
    assert base.training_seconds > predicted(hardware, sparsifier, width=16).training_seconds


@pytest.mark.parametrize("machine", MACHINES)
def test_twice_the_tokens_take_twice_the_hours(predicted: Callable[..., Prediction], machine: str) -> None:
    once, twice = (
        predicted(TABLE[machine], tokens=tokens, evaluation_tokens=tokens // 512) for tokens in (512 * 1024, 512 * 2048)
    )
    assert twice.hours == pytest.approx(2 * once.hours)
    assert twice.cost == pytest.approx(2 * once.cost)
    assert twice.tokens_per_second == once.tokens_per_second


def test_the_cost_is_of_all_devices(predicted: Callable[..., Prediction]) -> None:
    one, four = (predicted(TABLE["h100"], n_ranks=n) for n in (1, 4))
    assert one.cost == one.hours * TABLE["h100"].price
    assert four.cost == 4 * four.hours * TABLE["h100"].price


def test_a_cpu_harvests_before_a_step_and_a_gpu_during_it(predicted: Callable[..., Prediction]) -> None:
    cpu, gpu = (predicted(TABLE[name]) for name in ("cpu", "h100"))
    assert cpu.step_seconds == pytest.approx(cpu.training_seconds + sum(cpu.harvest.values()))
    assert gpu.step_seconds == max(gpu.training_seconds, sum(gpu.harvest.values()))


@pytest.mark.parametrize("machine", MACHINES)
def test_a_second_loss_and_a_second_reconstruction_take_longer(
    predicted: Callable[..., Prediction], machine: str
) -> None:
    hardware = replace(TABLE[machine], call=1e-12)
    once, more = NoAuxLossConfig(name="none"), AuxKConfig(name="aux_k", weight=0.1)
    multi = TopKConfig(name="topk", revival=1.0, multi_weight=0.1)
    none = predicted(hardware, "topk", aux_loss=once).training_seconds
    assert predicted(hardware, "topk", aux_loss=more).training_seconds > none
    assert predicted(hardware, "topk", aux_loss=once, sparsifier=multi).training_seconds > none


def test_layouts_split_the_step_and_pay_for_it(predicted: Callable[..., Prediction]) -> None:
    hardware = replace(TABLE["h100"], call=1e-12)
    slow = replace(hardware, link=hardware.link / 1000)
    alone = predicted(hardware)
    assert "communication" not in alone.training
    for layout in ("data", "features"):
        dials: dict[str, Any] = {"parallel": ParallelConfig(layout=layout), "n_ranks": 4}
        split = predicted(hardware, **dials)
        assert split.training["encode"] < alone.training["encode"] / 2
        assert split.training["select"] < alone.training["select"]
        assert 0 < split.training["communication"] < predicted(slow, **dials).training["communication"]


class Planned(NamedTuple):
    """The plan of a run of several SAEs of the bundled model, and what follows from it."""

    plan: Plan
    found: Prediction
    text: str
    model: MemoryModel


WIDTHS = [512, 8192, 1024, 4096, 2048, 512, 512]


@pytest.fixture(scope="module")
def planned() -> Callable[..., Planned]:
    config = compose_config(["tracking=none"])
    saes = [replace(config.sae, n_features=width, seed=seed) for seed, width in enumerate(WIDTHS)]
    source = config.source_for(saes)
    facts = check_stream(source, n_ranks=2)

    def of(*, layout: str = "data", n_ranks: int = 1, hardware: Hardware = TABLE["cpu"]) -> Planned:
        own = replace(config, parallel=ParallelConfig(layout=layout))
        plan = plan_of(own, facts, n_ranks=n_ranks, saes=saes, hardware=hardware)
        found = predict(plan, source, facts, hardware)
        model = MemoryModel(
            source=source,
            facts=facts,
            parallel=own.parallel,
            n_ranks=n_ranks,
            columns=plan.columns,
            copies_checkpoints=False,
            rounds=False,
        )
        return Planned(plan, found, describe(plan, source, path="here", prediction=found), model)

    return of


def test_one_harvest_serves_all_saes_and_the_slowest_rank_counts(planned: Callable[..., Planned]) -> None:
    one, two = planned(), planned(layout="saes", n_ranks=2)
    assert one.found.training_seconds == pytest.approx(sum(one.found.saes.values()))
    of_rank = {0: 0.0, 1: 0.0}
    for name, rank in two.plan.owners.items():
        of_rank[rank] += two.found.saes[name]
    sent = two.found.training["communication"]
    assert two.found.training_seconds - sent == pytest.approx(max(of_rank.values()))
    assert sum(two.found.harvest.values()) < sum(one.found.harvest.values())
    ranks = re.findall(r"^residual2 .* ([01]) +[\d.]+  .*seed=\d", two.text, flags=re.MULTILINE)
    assert ranks == [str(rank) for rank in (two.plan.owners[name] for name in two.plan.saes)]


def test_the_text_of_several_saes_is_a_table_of_narrow_lines(planned: Callable[..., Planned]) -> None:
    text = planned(hardware=TABLE["h100"]).text
    table = text.split("\n\n")[1].splitlines()
    heads = ["site", "sparsifier", "sparsity", "features", "parameters", "ms", "a", "step", "settings"]
    assert table[0].split() == heads
    assert [int(line.split()[4].replace(",", "")) for line in table[1:]] == WIDTHS
    assert max(map(len, table)) <= 100
    for word in ("predicted for", "no GPU has been measured", "tokens/s", "hours", "an SAE", "language model"):
        assert word in text


def test_the_memory_of_the_hardware_counts(planned: Callable[..., Planned]) -> None:
    with pytest.raises(ConfigError, match=r"and there are 0.1 GB on one h100. Not even the first of them would fit"):
        planned(hardware=replace(TABLE["h100"], memory_bytes=1e8))


@pytest.fixture(scope="module")
def models(planned: Callable[..., Planned]) -> dict[str, tuple[MemoryModel, list[SaePlan]]]:
    """Return the rule of memory and the SAEs of a run in two layouts."""
    runs = {layout: planned(layout=layout, n_ranks=2) for layout in ("data", "saes")}
    return {layout: (run.model, list(run.plan.saes.values())) for layout, run in runs.items()}


@given(layout=st.sampled_from(["data", "saes"]), share=st.floats(0, 1.1))
def test_the_number_that_fits_is_the_one_of_a_slow_count(
    models: dict[str, tuple[MemoryModel, list[SaePlan]]], layout: str, share: float
) -> None:
    model, saes = models[layout]
    needed = [needed_bytes(model.holdings(saes[:n])) for n in range(1, len(saes) + 1)]
    available = int(share * needed[-1])
    slow = 0
    while slow < len(saes) and needed[slow] <= available:
        slow += 1
    assert model.how_many_fit(saes, available=available) == slow
    if slow == len(saes):
        model.check(saes, available=available, where="for each")
        return
    many = f"The first {slow} of them would fit." if slow else "Not even the first of them would fit."
    with pytest.raises(ConfigError, match=re.escape(many)) as caught:
        model.check(saes, available=available, where="for each")
    assert "7 SAEs of" in str(caught.value)


def test_the_command_prints_time_and_cost_for_hardware_and_devices(tmp_path: Path, command: Command) -> None:
    plan = ("dry_run=true", "plan.hardware=h200", "plan.devices=2")
    done = command(*tiny_run(tmp_path), *plan, "grid={k:[4,8],layer.index:all}")
    assert done.status == 0, done.stderr
    assert "2 x h200; a prediction: no GPU has been measured" in done.stdout
    assert "2, layout data" in done.stdout
    assert done.stdout.count("mutual_choice") == 8
    assert re.search(r"cost +\$[\d.e-]+, \$[\d.e-]+ an SAE, at \$3.50 an hour of one h200", done.stdout)


def test_a_gpu_overlaps_unless_prefetching_is_off(rows: Path) -> None:
    both = {}
    for prefetch in ("null", "0"):
        config = compose_config(["harvest=tensors", f"harvest.path={rows / '32'}", "n_features=256", "k=8",
                                 "batch_tokens=512", "tokens=5120", f"harvest.prefetch={prefetch}"])  # fmt: skip
        facts = check_stream(config.source, n_ranks=1)
        plan = plan_of(config, facts, n_ranks=1, hardware=TABLE["h100"])
        predicted = predict(plan, config.source, facts, TABLE["h100"])
        harvest = sum(predicted.harvest.values())
        both[prefetch] = predicted.step_seconds, predicted.training_seconds, harvest
        text = describe(plan, config.source, path="runs/x", prediction=predicted)
        assert ("at the same time" in text) == (prefetch == "null")
        assert ("on h100 in a background thread" in text) == (prefetch == "null")
    ahead, after = both["null"], both["0"]
    assert ahead[0] == pytest.approx(max(ahead[1:]))
    assert after[0] == pytest.approx(sum(after[1:]))


def test_a_mesh_for_devices_needs_its_columns() -> None:
    typed = ["dry_run=true", "plan.hardware=h100", "plan.devices=4", "parallel=mesh"]
    with pytest.raises(ConfigError, match=r"Type parallel.feature_ranks"):
        compose_config(typed)
    compose_config([*typed, "parallel.feature_ranks=2"])
    compose_config(["parallel=mesh"])


def test_the_table_tells_saes_apart(tmp_path: Path, command: Command) -> None:
    done = command(*tiny_run(tmp_path), "dry_run=true", "grid={optimizer.lr:[1e-3,2e-3],seed:[0,1]}")
    assert done.status == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "mutual_choice" in line]
    assert len(lines) == len(set(lines)) == 4
    assert sum("optimizer.lr=0.002" in line and "seed=1" in line for line in lines) == 1
