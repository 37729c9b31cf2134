"""Bytes between ranks in a step, counted in four processes and compared with the table of docs/ranks.md."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_train.config import RunConfig
from tools import grid_world as world

pytestmark = [pytest.mark.multirank, pytest.mark.slow]

SIZE = 4
NARROW, WIDE = 256, 1024
"""Dictionary widths between which traffic is compared."""
COUNTED = [
    (kind, aux)
    for kind in world.TRAFFIC
    for aux in ("none", "aux_k")
    if aux == "none" or kind not in world.WITHOUT_AUX_K
]
OF_THE_BATCH = ("mutual_choice", "feature_choice")
"""Sparsifiers whose traffic has bounds. The traffic of the others is exact to the byte."""
WINDOW = {"feature_choice": 8 * world.N}
"""Dead windows of sparsifiers whose features may miss some steps. For the others it is one step."""
LAYOUTS = {"data": 1, "features": SIZE}
Counts = dict[tuple[str, str, str, int], int]
"""Bytes a step and rank, by layout, sparsifier, auxiliary loss and width."""


def count(rank: int, port: int, folder: str, configs: dict[Any, RunConfig]) -> None:
    """Count in one process; the first writes the counts."""
    ranks = world.join(rank, SIZE, port)
    counts = {}
    for layout, columns in LAYOUTS.items():
        ranks = ranks.arranged(columns=columns)
        for (kind, aux, width), config in configs.items():
            if layout == "features" or width == NARROW or kind in OF_THE_BATCH:
                counts[layout, kind, aux, width] = sum(world.traffic(config, ranks).values())
    if rank == 0:
        torch.save(counts, Path(folder) / "counts.pt")
    world.end()


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    folder = tmp_path_factory.mktemp("traffic")
    world.write_activations(folder / "rows")
    configs = {
        (kind, aux, n): world.counted(folder / "rows", kind, aux, n_features=n, dead_window=WINDOW.get(kind, world.N))
        for kind, aux in COUNTED
        for n in (NARROW, WIDE)
    }
    torch.multiprocessing.spawn(count, args=(world.free_port(), str(folder), configs), nprocs=SIZE)
    found: Counts = torch.load(folder / "counts.pt")
    return found


@pytest.mark.parametrize(("kind", "aux"), COUNTED)
def test_traffic_of_features_does_not_grow_with_the_dictionary(counts: Counts, kind: str, aux: str) -> None:
    assert counts["features", kind, aux, NARROW] == counts["features", kind, aux, WIDE]


def tabulated(kind: str, aux: str, *, n_features: int) -> tuple[float, float]:
    """Return a rank's bytes of a step in `data` and in `features`, by the table of docs/ranks.md."""
    share, n, d, f = (SIZE - 1) / SIZE, world.N, world.D, n_features

    def reduced(n_bytes: int) -> float:
        return 2 * share * n_bytes

    def rows(k: int) -> float:
        return share * (4 * n * min(k, f // SIZE) + 8 * n)  # candidates; cuts and ties back

    gathered, partial = share * 4 * n * d, reduced(4 * n * d)
    in_data, in_features = {
        "topk": (0, rows(5)),
        "topk, multi": (0, rows(5) + rows(20) + partial),
        "topk, nested": (0, rows(5) + 4 * partial),
        "gradient": (reduced(8), gathered + reduced(8) + rows(5)),
        "jumprelu": (reduced(4 * f + 2 * 8), reduced(2 * 8)),
        "relu": (reduced(2 * 8), reduced(2 * 8)),
        "p_anneal": (reduced(4 * 8), reduced(4 * 8)),
        "gated": (reduced(8 * f + 2 * 8), reduced(2 * 8) + partial),
        "temporal_mask": (reduced(2 * 8 + 24 * f), reduced(5 * 8) + partial),
    }[kind]
    in_data += reduced(4 * (2 * f * d + f + d) + 8 * f + 4)
    in_features += gathered + partial + reduced(4 * n + 8) + 4 * d
    if aux == "aux_k":
        in_data += reduced(4 * (d + 2))
        in_features += partial + rows(d // 2) + reduced(8)
    return in_data, in_features


@pytest.mark.parametrize(("kind", "aux"), [pair for pair in COUNTED if pair[0] not in OF_THE_BATCH])
def test_traffic_is_what_the_table_says(counts: Counts, kind: str, aux: str) -> None:
    in_data, in_features = tabulated(kind, aux, n_features=NARROW)
    assert counts["data", kind, aux, NARROW] == pytest.approx(in_data, abs=4)
    assert counts["features", kind, aux, NARROW] == pytest.approx(in_features, abs=4)


@pytest.mark.parametrize("n_features", [NARROW, WIDE])
def test_traffic_of_choices_over_the_batch_is_within_the_tables_bounds(counts: Counts, n_features: int) -> None:
    share, n, d = (SIZE - 1) / SIZE, world.N, world.D
    histograms = 6 * 3 * 2048 * 8  # two searches of three all-reduces, and counts
    parameters = 4 * (2 * n_features * d + n_features + d)
    small = 8 * 4 * n_features + 5000  # firing counts, scalars
    for kind, selection in (("mutual_choice", histograms), ("feature_choice", 16 * n_features + 8 * 5 * n)):
        moved = counts["data", kind, "none", n_features]
        assert moved <= 2 * share * (parameters + small) + 2 * selection, kind
        assert moved >= 2 * share * parameters - 8, kind
    gathered, reduced = 4 * n * d * share, 2 * 4 * n * d * share
    for kind, selection in (("mutual_choice", 2 * histograms), ("feature_choice", 0)):
        moved = counts["features", kind, "none", n_features]
        assert moved <= gathered + reduced + selection + 8 * n + 2000, kind
        assert moved >= gathered + reduced - 8, kind
