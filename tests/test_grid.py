"""One meaning on any number of processes in any layout: the same matches, weights and counters; little traffic."""

from pathlib import Path
from typing import Any

import grid_world as world
import pytest
import torch

pytestmark = pytest.mark.multirank

FLOAT32 = {"float32": 1e-4, "bf16": 1e-2}
AUX = ("none", "aux_k")
Found = dict[int, dict[Any, Any]]
"""What the processes of each world size found, by what was asked."""
WIDE = (256, 1024)
"""Dictionary widths between which traffic is compared."""


def is_paired(size: int, columns: int, case: str) -> bool:
    """Return whether a quick run tries a case in a layout: each in one or two of them, each layout with a third."""
    layouts = [(n, one) for n, some in world.LAYOUTS.items() if n > 1 for one in some]
    return size == 1 or (layouts.index((size, columns)) + list(world.CASES).index(case)) % 3 == 0


def everything(rank: int, size: int, port: int, folder: str, full: bool) -> None:
    """What each process of a world does; the first leaves what came out."""
    ranks = world.join(rank, size, port)
    rows = Path(folder) / "rows"
    results: dict[Any, Any] = {}
    for columns in world.LAYOUTS[size]:
        ranks = ranks.arranged(columns=columns)
        for case, overrides in world.CASES.items():
            if not full and not is_paired(size, columns, case):
                continue
            results["learn", columns, case] = world.learn(world.config_of(rows, overrides, precision="float64"), ranks)
            for precision in FLOAT32:
                config = world.config_of(rows, overrides, precision=precision)
                results[precision, columns, case] = world.one_step(config, ranks)
        for kind in ("topk", "mutual_choice", "feature_choice"):
            for aux in AUX:
                for n_features in WIDE if columns in (1, size) else ():
                    overrides = [f"sparsifier={kind}", f"aux_loss={aux}"]
                    config = world.config_of(rows, overrides, precision="float32", n_features=n_features)
                    results["traffic", columns, kind, aux, n_features] = world.traffic(config, ranks)
        config = world.config_of(rows, world.CASES["mutual choice, zipf"], precision="float64")
        world.save(config, ranks, Path(folder) / f"saved-{size}-{columns}", steps=20)
    for number, saved in enumerate(sorted(Path(folder).glob("saved-*"))):
        for columns in world.LAYOUTS[size]:
            if not full and size == 4 and (number + columns) % 3:
                continue
            ranks = ranks.arranged(columns=columns)
            results["resume", columns, saved.name] = world.resume(config, ranks, saved)
    if rank == 0:
        torch.save(results, Path(folder) / f"found-{size}.pt")
    if size > 1:
        world.end()


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["pairs", "product"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Return by world size what its processes found; each world starts once."""
    full = request.param
    folder = tmp_path_factory.mktemp("worlds")
    world.write_activations(folder / "rows")
    for size in world.LAYOUTS:
        if size == 1:
            everything(0, 1, 0, str(folder), full)
        else:
            torch.multiprocessing.spawn(everything, args=(size, world.free_port(), str(folder), full), nprocs=size)
    return {size: torch.load(folder / f"found-{size}.pt", weights_only=False) for size in world.LAYOUTS}


def others(found: Found, what: str, *rest: Any) -> dict[str, Any]:
    """Return what the worlds of several processes found, by size and columns."""
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
    assert len(alone["matches"]) == world.STEPS
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
    """As many matches; those that differ lie at their cut, within rounding; gradients agree."""
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
    """Return the affinities of the matches that only one of two has, by the token, feature or batch that they fill."""
    groups: dict[int, list[float]] = {}
    for index in here.keys() ^ there.keys():
        token, feature = divmod(index, world.F)
        group = {"topk": token, "mutual": 0}.get(case.replace(",", " ").split()[0], feature)
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


@pytest.mark.parametrize("aux", AUX)
@pytest.mark.parametrize("kind", ["topk", "mutual_choice", "feature_choice"])
def test_traffic_of_features_does_not_grow_with_the_dictionary(found: Found, kind: str, aux: str) -> None:
    narrow, wide = (found[4]["traffic", 4, kind, aux, n_features] for n_features in WIDE)
    assert sum(narrow.values()) == sum(wide.values()), (narrow, wide)


@pytest.mark.parametrize("size", [2, 4])
def test_traffic_is_what_the_table_says(found: Found, size: int) -> None:

    def bytes_of(*key: Any) -> int:
        return sum(found[size]["traffic", *key].values())

    share, n, d = (size - 1) / size, world.N, world.D
    histograms = 6 * 3 * 2048 * 8  # two searches of three all-reduces, and counts
    for n_features in WIDE:
        parameters = 4 * (2 * n_features * d + n_features + d)
        small = 8 * 4 * n_features + 5000  # firing counts, scalars
        for kind, selection in (
            ("topk", 0),
            ("mutual_choice", histograms),
            ("feature_choice", 16 * n_features + 8 * 5 * n),
        ):
            moved = bytes_of(1, kind, "none", n_features)
            assert moved <= 2 * share * (parameters + small) + 2 * selection, (kind, n_features)
            assert moved >= 2 * share * parameters - 8, (kind, n_features)
        gathered, reduced = 4 * n * d * share, 2 * 4 * n * d * share
        for kind, selection in (
            ("topk", 4 * n * 5 * share + 12 * n),
            ("mutual_choice", 2 * histograms),
            ("feature_choice", 0),
        ):
            moved = bytes_of(size, kind, "none", n_features)
            assert moved <= gathered + reduced + selection + 8 * n + 2000, (kind, n_features)
            assert moved >= gathered + reduced - 8, (kind, n_features)
