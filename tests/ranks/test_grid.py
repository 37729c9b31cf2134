"""Matches, weights and counters are the same on any number of processes in any layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_train.config import RunConfig
from tools import grid_world as world

pytestmark = pytest.mark.multirank

FLOAT32 = {"float32": 1e-4, "bf16": 1e-2}
Found = dict[int, dict[Any, Any]]
"""Results of the processes by world size, then by case."""


def is_paired(size: int, columns: int, case: str) -> bool:
    """Return whether a quick run tries a case in a layout: each in one of them, each layout with a fifth."""
    layouts = [(n, one) for n, some in world.LAYOUTS.items() if n > 1 for one in some]
    return size == 1 or (layouts.index((size, columns)) + list(world.CASES).index(case)) % 5 == 0


@dataclass(frozen=True, slots=True)
class Work:
    """The configurations of all worlds, composed once. Composing takes longer than many of the runs."""

    full: bool
    steps: int
    long: dict[str, RunConfig]
    """Configurations by case, in float64."""
    short: dict[tuple[str, str], RunConfig]
    """Configurations by precision and case, for one step."""


def composed(rows: Path, *, full: bool) -> Work:
    """Return all configurations of a grid."""
    steps = world.STEPS if full else world.QUICK_STEPS
    return Work(
        full=full,
        steps=steps,
        long={c: world.config_of(rows, o, precision="float64", steps=steps) for c, o in world.CASES.items()},
        short={(p, c): world.config_of(rows, o, precision=p) for p in FLOAT32 for c, o in world.CASES.items()},
    )


def everything(rank: int, size: int, port: int, folder: str, work: Work) -> None:
    """Run all cases in one process of a world; the first writes the results."""
    ranks = world.join(rank, size, port)
    results: dict[Any, Any] = {}
    for columns in world.LAYOUTS[size]:
        ranks = ranks.arranged(columns=columns)
        for case, config in work.long.items():
            if not work.full and not is_paired(size, columns, case):
                continue
            results["learn", columns, case] = world.learn(config, ranks)
            for precision in FLOAT32:
                results[precision, columns, case] = world.one_step(work.short[precision, case], ranks)
        config = work.long["mutual choice, zipf"]
        world.save(
            config, ranks, Path(folder) / f"saved-{size}-{columns}", steps=3 * work.steps // 4
        )  # features are dead by then
    for number, saved in enumerate(sorted(Path(folder).glob("saved-*"))):
        for columns in world.LAYOUTS[size]:
            if size == 4 and (number + columns) % 3:
                continue
            ranks = ranks.arranged(columns=columns)
            results["resume", columns, saved.name] = world.resume(config, ranks, saved)
    if rank == 0:
        torch.save(results, Path(folder) / f"found-{size}.pt")
    if size > 1:
        world.end()


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["pairs", "product"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return the results by world size. Each world starts once."""
    folder = tmp_path_factory.mktemp("worlds")
    world.write_activations(folder / "rows")
    work = composed(folder / "rows", full=request.param)
    for size in world.LAYOUTS:
        if size == 1:
            everything(0, 1, 0, str(folder), work)
        else:
            torch.multiprocessing.spawn(everything, args=(size, world.free_port(), str(folder), work), nprocs=size)
    return {size: torch.load(folder / f"found-{size}.pt", weights_only=False) for size in world.LAYOUTS}


def others(found: Found, what: str, *rest: Any) -> dict[str, Any]:
    """Return the results of the worlds of several processes, by size and columns."""
    return {
        f"{size} ranks, {columns} columns": results[what, columns, *rest]
        for size, results in found.items()
        for columns in world.LAYOUTS[size]
        if size > 1 and (what, columns, *rest) in results
    }


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Return whether b is within `tolerance` of a, relative to a's largest entry."""
    return float((a - b).abs().max()) <= tolerance * float(a.abs().max())


@pytest.mark.parametrize("case", world.CASES)
def test_float64_runs_keep_the_same_matches_and_weights(found: Found, case: str) -> None:
    alone = found[1]["learn", 1, case]
    assert len(alone["matches"]) in (world.STEPS, world.QUICK_STEPS)
    for where, result in others(found, "learn", case).items():
        for step, (here, there) in enumerate(zip(alone["matches"], result["matches"], strict=True)):
            assert torch.equal(here, there), (where, step)
        for name, value in alone["weights"].items():
            assert close(value, result["weights"][name], 1e-9), (where, name)
        assert torch.equal(alone["since"], result["since"]), where
        for key, value in alone["row"].items():
            assert result["row"][key] == pytest.approx(value, rel=1e-6), (where, key)


@pytest.mark.parametrize("precision", FLOAT32)
@pytest.mark.parametrize("case", world.CASES)
def test_one_float32_step_differs_by_rounding_only(found: Found, case: str, precision: str) -> None:
    """The numbers of matches are equal, matches that differ lie at their cut within rounding, and gradients agree."""
    alone = found[1][precision, 1, case]
    near = {"float32": 1e-5, "bf16": 1e-2}[precision]
    for where, result in others(found, precision, case).items():
        here, there = alone["matches"], result["matches"]
        assert len(here) == len(there), where
        for group, values in swapped(case, here, there).items():
            assert max(values) - min(values) <= near * max(values), (where, group, values)
        for name, value in alone["gradients"].items():
            assert close(value, result["gradients"][name], FLOAT32[precision]), (where, name)


def swapped(case: str, here: dict[int, float], there: dict[int, float]) -> dict[int, list[float]]:
    """Return the affinities of matches that only one of two codes has, by the token, feature or batch of their cut."""
    groups: dict[int, list[float]] = {}
    for index in here.keys() ^ there.keys():
        token, feature = divmod(index, world.F)
        group = {"topk": token, "gradient": token, "mutual": 0}.get(case.replace(",", " ").split()[0], feature)
        groups.setdefault(group, []).append(here.get(index, there.get(index, 0.0)))
    return groups


def test_a_checkpoint_goes_on_in_any_layout(found: Found) -> None:
    uninterrupted = found[1]["learn", 1, "mutual choice, zipf"]["weights"]
    n = 0
    for size, results in found.items():
        for (what, columns, *rest), weights in ((key, value) for key, value in results.items() if key[0] == "resume"):
            for name, value in uninterrupted.items():
                assert close(value, weights[name], 1e-9), (size, columns, rest, what, name)
            n += 1
    assert n >= 1 + 2 * 3 + 6  # each world resumes what it and the smaller worlds saved, the largest some of it
