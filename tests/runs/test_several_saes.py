"""Runs of several SAEs: each equals itself alone, stops alone, resumes with all others, and tells its own results."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tools.command_line import Command, Outcome, changed
from tools.processes import finish, kill_after_progress, launch
from tools.tiny_runs import rows_run, tiny_run

GRID = "grid={layer:[residual,mlp,attention],layer.index:[1,2],k:[4,8]}"
ALONE = {
    "residual1.mutual_choice.k8.f256.s0": ["layer=residual", "layer.index=1", "k=8"],
    "attention2.mutual_choice.k4.f256.s0": ["layer=attention", "layer.index=2", "k=4"],
}
"""SAEs of the grid, with the settings that train each of them alone."""


def result_of(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the summary of the one run below a folder, and the files of its SAEs by name."""
    (run,) = folder.iterdir()
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary, {path.parent.name: path.read_bytes() for path in run.glob("saes/*/sae.safetensors")}


def test_an_sae_among_others_equals_the_same_sae_alone(tmp_path: Path, command: Command) -> None:
    together = command(*changed(tiny_run(tmp_path), f"runs={tmp_path / 'together'}"), GRID)
    assert together.status == 0, together.stderr
    summary, files = result_of(tmp_path / "together")
    assert len(files) == 12
    for name, settings in ALONE.items():
        alone = command(*changed(tiny_run(tmp_path), f"runs={tmp_path / name}", *settings))
        assert alone.status == 0, alone.stderr
        own, own_files = result_of(tmp_path / name)
        assert own_files == {name: files[name]}
        assert own["saes"][name] == summary["saes"][name]
    look_at_results(tmp_path / "together", together)


def look_at_results(folder: Path, done: Outcome) -> None:
    """Check what a finished run of the grid leaves and prints."""
    (run,) = folder.iterdir()
    assert run.name.startswith("bundled.12_saes-")
    summary, files = result_of(folder)
    entries = json.loads((run / "suite.json").read_text())
    assert [entry["name"] for entry in entries] == list(summary["saes"])
    assert set(files) == set(summary["saes"])
    for entry in entries:
        figures = summary["saes"][entry["name"]]
        assert (run / entry["path"] / "sae.safetensors").is_file()
        assert (entry["l0"], entry["fvu"], entry["delta_ce"]) == (figures["l0"], figures["fvu"], figures["delta_ce"])
        assert entry["name"].startswith(f"{entry['site']}.")
        assert f"{entry['name']}: L0 {entry['l0']:.1f}" in done.stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"] for row in rows}
    for step in steps:
        assert {row["sae"] for row in rows if row["step"] == step} == set(files)
    trained = [row for row in rows if "train/fvu" in row]
    for part in ("read", "tokenised", "harvested", "pooled", "trained"):
        speeds = [row.get(f"perf/{part}_tokens_per_second") for row in trained]
        assert any(speeds)  # of an interval that refilled no pool most are absent
        assert all(speed is None or speed > 0 for speed in speeds)
        assert summary["throughput"][part] > 0
    assert summary["throughput"]["slowest"] in summary["throughput"]
    assert "highest FVU" in done.stderr
    assert "slowest: " in done.stderr


def rows_of(folder: Path, *more: str) -> list[str]:
    return changed(rows_run(folder), "log_every=256", *more)


def test_an_sae_that_diverges_is_stopped_and_the_others_go_on(tmp_path: Path, command: Command) -> None:
    (tmp_path / "alone").mkdir()
    settings = rows_of(tmp_path, 'variants=["k=4","k=3 optimizer.lr=1e8","sparsifier=topk"]')
    done = command(*settings)
    assert done.status == 3, done.stderr
    summary, files = result_of(tmp_path / "runs")
    (stopped,) = (name for name, figures in summary["saes"].items() if "stopped" in figures)
    assert ".k3." in stopped
    assert list(summary["saes"][stopped]) == ["stopped"]
    assert set(files) == set(summary["saes"]) - {stopped}
    assert f"{stopped} is stopped and left out: " in done.stderr
    entries = {entry["name"]: entry for entry in json.loads(next(tmp_path.glob("runs/*/suite.json")).read_text())}
    assert entries[stopped]["stopped"] == summary["saes"][stopped]["stopped"]
    again = command(*settings)
    assert again.status == 3
    assert "already finished" in again.stdout
    assert "3 SAEs, 1 of them stopped" in again.stdout
    assert f"{stopped} was stopped: {summary['saes'][stopped]['stopped']}" in again.stdout
    alone = command(*rows_of(tmp_path / "alone", "k=4"))
    assert alone.status == 0, alone.stderr
    (weights,) = result_of(tmp_path / "alone" / "runs")[1].values()
    assert weights in files.values()


@pytest.mark.parametrize("rate", ["1e8", "1e20"])
def test_an_evaluation_does_not_end_a_run_of_which_one_sae_diverges(
    tmp_path: Path, command: Command, rate: str
) -> None:
    """No row is due before the evaluation: at 1e8 weights are huge and finite, at 1e20 the loss is not."""
    lists = f'variants=["k=4","k=3 optimizer.lr={rate}"]'
    done = command(*changed(rows_run(tmp_path), "log_every=4096", "evaluate_every=512"), lists)
    assert done.status == 3, done.stderr
    summary, files = result_of(tmp_path / "runs")
    assert ["stopped" in figures for figures in summary["saes"].values()] == [False, True]
    assert len(files) == 1


def test_a_run_whose_saes_all_diverge_is_finished_with_status_3(tmp_path: Path, command: Command) -> None:
    for settings in (['variants=["k=4","k=3"]', "optimizer.lr=1e8"], ["optimizer.lr=1e8"]):
        for _ in range(2):
            done = command(*rows_of(tmp_path, f"runs={tmp_path / str(len(settings))}", *settings))
            assert done.status == 3, done.stderr
            assert "stopped: " in done.stdout
        summary, files = result_of(tmp_path / str(len(settings)))
        assert files == {}
        assert all(list(figures) == ["stopped"] for figures in summary["saes"].values())


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [[1, 1, 1], [2, 1, 2]], ids=["one process", "spread over one rank and two"])
def test_a_killed_run_resumes_with_all_its_saes(tmp_path: Path, n_ranks: list[int]) -> None:
    """With `parallel=saes` the bits are those of one process, whatever ranks it resumes on."""
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    grid = "grid={layer:[residual,mlp],k:[4,7]}"
    assert finish(launch(tmp_path / "whole", 1, [grid])).status == 0
    more = [grid, "parallel=saes"] if max(n_ranks) > 1 else [grid]
    chance = random.Random(0)
    for size in n_ranks[:-1]:
        kill_after_progress(launch(tmp_path / "killed", size, more), tmp_path / "killed", chance)
    done = finish(launch(tmp_path / "killed", n_ranks[-1], more))
    assert done.status == 0, done.stdout
    assert "resuming at step" in done.stdout
    whole, killed = result_of(tmp_path / "whole" / "runs"), result_of(tmp_path / "killed" / "runs")
    assert whole[1] == killed[1]
    assert whole[0]["saes"] == killed[0]["saes"]


@pytest.mark.slow
def test_an_sae_that_diverges_on_one_rank_of_two_is_stopped_alone(tmp_path: Path, torchrun: Command) -> None:
    settings = rows_of(tmp_path, 'variants=["k=4","k=3 optimizer.lr=1e8","sparsifier=topk"]')
    for layout in ("saes", "features"):
        done = torchrun(2, *changed(settings, f"runs={tmp_path / layout}"), f"parallel={layout}")
        assert done.status == 1, done.stderr  # torchrun reports any status as 1
        summary, files = result_of(tmp_path / layout)
        assert [list(figures) == ["stopped"] for figures in summary["saes"].values()] == [False, True, False]
        assert len(files) == 2


def test_another_list_of_saes_in_a_named_directory_says_what_differs(tmp_path: Path, command: Command) -> None:
    first = command(*rows_of(tmp_path, "name=mine", "grid={k:[2,3]}"))
    assert first.status == 0, first.stderr
    other = command(*rows_of(tmp_path, "name=mine", "grid={k:[3,4]}"))
    assert other.status == 2
    assert "its SAE tensors.mutual_choice.k2.f64.s0 is not asked for" in other.stderr
    assert "tensors.mutual_choice.k4.f64.s0 is none of its SAEs" in other.stderr
    single = command(*rows_of(tmp_path, "name=mine", "k=3"))
    assert single.status == 2
    assert "it has 2 SAEs, and this one 1" in single.stderr
    assert command(*rows_of(tmp_path, "name=mine", "grid={k:[2,3]}")).status == 0
