"""The entries of suite.json, and the table that a run of several SAEs prints."""

import json
from dataclasses import replace
from typing import Any

import pytest

from sae_train.config import BlockLayerConfig, ModuleLayerConfig, SaeConfig, differing
from sae_train.formats.suite import WIDTH, suite_entry, suite_table
from tools.small_runs import run_config

FIGURES = {"l0": 31.96, "target_l0": 32.0, "fvu": 0.21, "delta_ce": 0.3, "ce_recovered": 0.95, "dead_fraction": 0.01,
           "density": {"gini": 0.5}}  # fmt: skip
SOURCE = {"model": "org/model", "revision": "abc", "data": "org/text", "prepends_bos": True}


def sae_config(**changes: Any) -> SaeConfig:
    return replace(run_config(k=32.0).sae, **changes)


def entry(name: str, figures: dict[str, Any] | None = None, *, config: SaeConfig | None = None,
          site: str = "residual2", source: dict[str, Any] | None = None,
          settings: dict[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    return suite_entry(
        name, FIGURES if figures is None else figures, config or sae_config(), site=site, d_model=16, n_features=64,
        tokens=640, source=SOURCE if source is None else source, settings=settings or {},
    )  # fmt: skip


def test_an_entry_names_the_sae_its_figures_and_its_origin() -> None:
    assert entry("a") == {
        "name": "a", "site": "residual2", "layer": 2, "d_model": 16, "width": 64, "k": 32.0,
        "sparsifier": "mutual_choice", "seed": 0, "tokens": 640, "model": "org/model", "revision": "abc",
        "data": "org/text", "l0": 31.96, "target_l0": 32.0, "fvu": 0.21, "delta_ce": 0.3, "ce_recovered": 0.95,
        "dead_fraction": 0.01, "path": "saes/a",
    }  # fmt: skip
    assert json.loads(json.dumps(entry("a"))) == entry("a")


def test_an_entry_holds_the_settings_in_which_saes_differ() -> None:
    slow = replace(sae_config(), optimizer=replace(sae_config().optimizer, lr=1e-4))
    found = differing({"a": sae_config(), "b": slow, "c": sae_config(k=16.0)})
    assert found == {"a": {"optimizer.lr": sae_config().optimizer.lr}, "b": {"optimizer.lr": 1e-4},
                     "c": {"optimizer.lr": sae_config().optimizer.lr}}  # fmt: skip
    assert entry("b", settings=found["b"])["settings"] == {"optimizer.lr": 1e-4}
    assert differing({"a": sae_config(), "b": sae_config(k=8.0)}) == {"a": {}, "b": {}}


def test_what_does_not_apply_is_absent() -> None:
    few = {key: FIGURES[key] for key in ("l0", "target_l0", "fvu", "dead_fraction")}
    made = entry("a", few, site="tensors", source={"data": "rows", "rows": 9})
    assert not {"layer", "model", "revision", "delta_ce", "ce_recovered"} & made.keys()
    stopped = entry("a", {"stopped": "FVU is 1e9"})
    assert stopped["stopped"] == "FVU is 1e9"
    assert not {"l0", "fvu", "path"} & stopped.keys()


@pytest.mark.parametrize(
    ("layer", "site", "block"),
    [
        (BlockLayerConfig(kind="residual", index="all"), "residual11", 11),
        (BlockLayerConfig(kind="mlp", index=-1), "mlp3", 3),
        (ModuleLayerConfig(kind="module", path="h.1", side="output"), "module.h.1", None),
    ],
)
def test_the_block_is_that_of_the_site(layer: Any, site: str, block: int | None) -> None:
    assert entry("a", config=sae_config(layer=layer), site=site).get("layer") == block


def test_the_table_leaves_out_what_all_names_share() -> None:
    names = [f"{site}.mutual_choice.k{k}.f64.s0" for site in ("residual1", "mlp2") for k in (16, 32)]
    entries = [entry(name) for name in names]
    entries[2] = entry(names[2], {"stopped": "FVU is 1e+09 over the 1,024 tokens before step 10"})
    lines = suite_table(entries).splitlines()
    assert lines[0].split()[:2] == ["SAE", "*.mutual_choice.*.f64.s0"]
    assert lines[1].split() == ["residual1.k16", "32.0", "32", "0.210", "95.0%", "1.0%"]
    assert lines[3].split(maxsplit=1) == ["mlp2.k16", "stopped: FVU is 1e+09 over the 1,024 tokens before step 10"]
    assert [line.split()[0] for line in lines[1:]] == ["residual1.k16", "residual1.k32", "mlp2.k16", "mlp2.k32"]


@pytest.mark.parametrize(
    ("names", "heading", "short"),
    [
        (["residual1.topk.k4.s0", "residual1.topk.matryoshka.k4.s0", "residual1.topk.aligned.k4.s0"],
         "SAE residual1.*.k4.s0", ["topk", "topk.matryoshka", "topk.aligned"]),
        (["residual1.topk.k4.s0", "module.h.1.topk.k4.s0"], "SAE *.topk.k4.s0", ["residual1", "module.h.1"]),
        (["residual1.topk.k2.5.s0", "residual1.topk.k2.s0"], "SAE residual1.topk.*.s0", ["k2.5", "k2"]),
        (["residual1.topk.k4.s0"], "SAE", ["residual1.topk.k4.s0"]),
    ],
)  # fmt: skip
def test_short_names_of_different_lengths(names: list[str], heading: str, short: list[str]) -> None:
    lines = suite_table([entry(name) for name in names]).splitlines()
    assert lines[0].split("  ")[0].strip() == heading
    assert [line.split()[0] for line in lines[1:]] == short
    assert len(set(short)) == len(names)


def test_the_table_fits_its_width() -> None:
    names = [f"module.{'x' * length}.topk.k4.f64.s{length}" for length in (3, 90, 200)]
    entries = [entry(name) for name in names[:2]] + [entry(names[2], {"stopped": "because\n" * 40})]
    lines = suite_table(entries).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= WIDTH
    assert "..." in lines[2]
    assert len(suite_table([entry("a", {"stopped": "x"}), entry("b", {"stopped": "x"})]).splitlines()) == 3


def test_figures_that_are_absent_are_dashes() -> None:
    few = {key: FIGURES[key] for key in ("l0", "target_l0", "fvu", "dead_fraction")}
    line = suite_table([entry("a", few), entry("b")]).splitlines()[1]
    assert line.split() == ["a", "32.0", "32", "0.210", "-", "1.0%"]
