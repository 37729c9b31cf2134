"""Each recipe of conf/experiment composes to the SAEs that it promises, names its source, and yields to typed keys."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import sae_train.conf
from sae_train.assets import model_directory
from sae_train.cli.compose import compose_request
from sae_train.cli.point import Point
from sae_train.config import BlockLayerConfig, SaeConfig

FOLDER = Path(sae_train.conf.__file__).parent / "experiment"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
BLOCKS = {"gpt2": 12, "pythia_160m_deduped": 12, "gemma_2_2b": 26, "llama_3_1_8b": 32}
"""Blocks of the published models, as in their config.json on the hub."""


def composed(*arguments: str) -> Point:
    (point,) = compose_request(list(arguments), sweep=False).points
    return point


def blocks_of(model: str) -> int:
    if model in BLOCKS:
        return BLOCKS[model]
    n_blocks: int = json.loads((model_directory() / "config.json").read_text())["num_hidden_layers"]
    return n_blocks


def layer_index(sae: SaeConfig) -> Any:
    assert isinstance(sae.layer, BlockLayerConfig)
    return sae.layer.index


def sites_of(sae: SaeConfig, n_blocks: int) -> int:
    """Return the number of sites that an SAE's layer means."""
    return n_blocks if layer_index(sae) == "all" else 1


def test_the_promised_recipes_are_there() -> None:
    assert {"suite", "gemma_scope_2b", "batch_topk_gpt2", "saebench_pythia_160m", "llama_scope_8b"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_makes_the_saes_that_it_promises_and_names_its_source(recipe: str) -> None:
    text = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8")
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    promised = int(re.findall(r"(\d+) SAEs", text)[0])
    point = composed(f"experiment={recipe}")
    n_blocks = blocks_of(point.config.model.name)
    assert sum(sites_of(sae, n_blocks) for sae in point.saes) == promised


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_typed_wins_over_a_recipe(recipe: str) -> None:
    typed = ["model=pythia_70m", "data=bundled", "tokens=40_960", "batch_tokens=512", "optimizer.lr=0.125",
             "optimizer.warmup_tokens=0", "variants=null", "grid={layer.index:[1,3],k:[6,7]}", "budget.start_k=null",
             "budget.anneal=0", "dead_window=4096", "sparsifier=mutual_choice", "aux_loss=none"]  # fmt: skip
    point = composed(f"experiment={recipe}", *typed)
    config = point.config
    assert (config.model.name, config.data.name) == ("pythia_70m", "bundled")
    assert (config.tokens, config.batch_tokens) == (40_960, 512)
    wanted = [("mutual_choice", "none", 0.125, index, k) for index, k in itertools.product([1, 3], [6, 7])]
    got = [
        (s.sparsifier.name, s.aux_loss.name, s.optimizer.lr, getattr(s.layer, "index", None), s.k) for s in point.saes
    ]
    assert sorted(got) == sorted(wanted)


def test_the_suite_is_the_product_of_its_lists() -> None:
    saes = composed("experiment=suite").saes
    got = {(sae.layer.kind, layer_index(sae), sae.expansion, sae.k) for sae in saes}
    assert got == set(itertools.product(["residual", "mlp", "attention"], ["all"], [4, 8], [16, 32]))
    width = json.loads((model_directory() / "config.json").read_text())["hidden_size"]
    assert sorted({sae.expansion * width for sae in saes}) == [1024, 2048]


def test_saebench_has_its_seven_baselines_at_every_width_and_l0() -> None:
    saes = composed("experiment=saebench_pythia_160m").saes
    kinds = Counter((sae.sparsifier.name, sae.nesting.name) for sae in saes)
    assert set(kinds.values()) == {18}
    assert {kind for kind, _ in kinds} == {"mutual_choice", "topk", "jumprelu", "gated", "relu", "p_anneal"}
    assert ("mutual_choice", "matryoshka") in kinds
    assert {(sae.n_features, sae.k) for sae in saes} == set(
        itertools.product([4096, 16384, 65536], [20, 40, 80, 160, 320, 640])
    )


def test_gemma_scope_keeps_its_layout_with_another_sparsifier() -> None:
    """The thresholds are in a choice of their own, so that another sparsifier can take its place."""
    theirs, ours = composed("experiment=gemma_scope_2b"), composed("experiment=gemma_scope_2b", "sparsifier=topk")
    assert {sae.sparsifier.name for sae in theirs.saes} == {"jumprelu"}
    assert {getattr(sae.sparsifier, "threshold", None) for sae in theirs.saes} == {0.001}
    assert {sae.sparsifier.name for sae in ours.saes} == {"topk"}
    assert [(s.layer, s.n_features, s.k) for s in ours.saes] == [(s.layer, s.n_features, s.k) for s in theirs.saes]
