"""`variants` and `grid` make the SAEs that a slow product makes, and each wrong entry has one message."""

import itertools
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_train.cli.compose import compose_config, compose_request
from sae_train.cli.library import Library, opened
from sae_train.cli.point import Point
from sae_train.cli.suite import check_point
from sae_train.cli.train import run_command
from sae_train.config import BlockLayerConfig, SaeConfig, TopKConfig
from tools.command_line import Command

VARIANTS = 'variants=["k=16","sparsifier=topk k=24"]'
GRID = "grid={layer:[residual,mlp],layer.index:[1,2],k:[16,32]}"
RECIPE = """\
# @package _global_
defaults:
  - override /sparsifier: topk
k: 7
grid: {layer: [residual, mlp], layer.index: all, k: [16, 32]}
"""


def saes(*typed: str, **options: Any) -> tuple[SaeConfig, ...]:
    """Return the SAEs of the one run that these arguments ask for."""
    (point,) = compose_request(list(typed), sweep=False, **options).points
    return point.saes


def block(sae: SaeConfig) -> tuple[str, int | str]:
    assert isinstance(sae.layer, BlockLayerConfig)
    return sae.layer.kind, sae.layer.index


def test_without_variants_and_grid_there_is_one_sae() -> None:
    (point,) = compose_request(["k=7", "variants=null", "grid=null"], sweep=False).points
    assert point.saes == (point.config.sae,)


def test_variants_are_sets_of_overrides() -> None:
    first, second = saes(VARIANTS, "seed=3")
    assert (first.k, first.sparsifier.name, first.seed) == (16, "mutual_choice", 3)
    assert (second.k, second.sparsifier.name, second.seed) == (24, "topk", 3)
    assert second == compose_config(["sparsifier=topk", "k=24", "seed=3"]).sae


def test_a_grid_takes_every_combination_the_last_key_fastest() -> None:
    found = saes(GRID, "k=99")
    expected = itertools.product(("residual", "mlp"), (1, 2), (16, 32))
    assert [(*block(sae), sae.k) for sae in found] == list(expected)


def test_variants_come_before_the_grid() -> None:
    found = saes(GRID, 'variants=["seed=1","sparsifier=topk sparsifier.multi_weight=0.125"]')
    grid = itertools.product(("residual", "mlp"), (1, 2), (16, 32))
    expected = [(name, *each) for name, each in itertools.product(("mutual_choice", "topk"), grid)]
    assert [(sae.sparsifier.name, *block(sae), sae.k) for sae in found] == expected
    assert [s.sparsifier.multi_weight for s in found if isinstance(s.sparsifier, TopKConfig)] == [0.125] * 8


@pytest.mark.parametrize("index", ["all", '"every=4"'])
def test_the_blocks_of_a_grid_may_be_left_to_the_model(index: str) -> None:
    (sae,) = saes(f"grid={{layer.index:{index}}}")
    assert block(sae) == ("residual", index.strip('"'))
    assert isinstance(sae.layer, BlockLayerConfig)
    assert sae.layer.stride == (1 if index == "all" else 4)
    assert sae.layer.names_several


def test_a_list_and_null_are_values_of_a_grid() -> None:
    found = saes("nesting=matryoshka", "grid={nesting.prefixes:[[0.5,1],[0.25,1]],dead_window:[null,100000]}")
    assert [(sae.nesting.prefixes, sae.dead_window) for sae in found] == [  # type: ignore[attr-defined]
        ([0.5, 1.0], None), ([0.5, 1.0], 100_000), ([0.25, 1.0], None), ([0.25, 1.0], 100_000),
    ]  # fmt: skip
    assert [sae.k for sae in saes("grid={k:16}")] == [16]


def test_words_of_a_variant_may_hold_spaces_in_brackets_and_quotes() -> None:
    typed = ["layer=module", """variants=["nesting=matryoshka  nesting.prefixes=[0.5, 1] layer.path='a b'"]"""]
    (sae,) = saes(*typed)
    assert (sae.nesting.prefixes, sae.layer.path) == ([0.5, 1.0], "a b")  # type: ignore[attr-defined]


def test_the_run_has_the_settings_of_the_first_sae() -> None:
    (point,) = compose_request(["k=99", GRID], sweep=False).points
    assert point.config.sae == point.saes[0]
    typed = {"layer": ["residual", "mlp"], "layer.index": [1, 2], "k": [16, 32]}
    assert (point.config.grid, point.config.variants) == (typed, None)


AXES = {
    "k": st.sampled_from([4.0, 8.0, 16.5]),
    "seed": st.integers(0, 9),
    "layer": st.sampled_from(["residual", "mlp", "attention"]),
    "layer.index": st.sampled_from([0, -1, 3, "middle"]),
    "optimizer.lr": st.sampled_from([None, 1e-3, 0.01]),
    "n_features": st.sampled_from([None, 64, 1024]),
}
GRIDS = st.dictionaries(st.sampled_from(sorted(AXES)), st.none(), min_size=1, max_size=3).flatmap(
    lambda keys: st.fixed_dictionaries({key: st.lists(AXES[key], min_size=1, max_size=3, unique=True) for key in keys})
)


def typed_grid(grid: dict[str, list[Any]]) -> str:
    """Return a grid as it is typed."""
    values = {key: ",".join("null" if v is None else str(v) for v in each) for key, each in grid.items()}
    return f"grid={{{','.join(f'{key}:[{each}]' for key, each in values.items())}}}"


def composed(library: Library, *arguments: str) -> tuple[SaeConfig, ...]:
    """Return the SAEs of one run, composed by a library that caches compositions."""
    overrides, refused = library.read(list(arguments), sweep=False)
    config, found, problems = check_point(library, overrides)
    assert (refused, problems, config is None) == ({}, [], False)
    return found


def test_any_small_grid_is_the_product_of_runs() -> None:
    with opened() as library:

        @given(grid=GRIDS)
        @settings(max_examples=15)
        def look(grid: dict[str, list[Any]]) -> None:
            expected = list[SaeConfig]()
            for values in itertools.product(*grid.values()):
                alone = [f"{key}={'null' if v is None else v}" for key, v in zip(grid, values, strict=True)]
                expected += composed(library, *alone)
            assert composed(library, typed_grid(grid)) == tuple(expected)

        look()


MESSAGES = {
    "variants=k16": 'variants=k16: not a list of texts. Write \'variants=["k=16","sparsifier=topk k=24"]\', or null.',
    "variants=[]": 'variants=[]: empty. Give it entries, as in \'variants=["k=16","sparsifier=topk k=24"]\', write '
    "null, or remove it.",
    "'variants=[[k]]'": "variants=[[k]]: ['k'] is not a text. Write 'variants=[\"k=16\",\"sparsifier=topk k=24\"]'.",
    'variants=["k=16"]': "variants=[k=16]: cannot be read. A shell changes quotes and braces, so quote all of it: "
    '\'variants=["k=16","sparsifier=topk k=24"]\'.',
    "grid=k:[1 grid=2]": "grid=k:[1: cannot be read. A shell changes quotes and braces, so quote all of it: "
    "'grid={layer:[residual,mlp],k:[16,32]}'.",
    "grid=k": "grid=k: not a mapping from keys to lists. Write 'grid={layer:[residual,mlp],k:[16,32]}', or null.",
    "grid={}": "grid={}: empty. Give it entries, as in 'grid={layer:[residual,mlp],k:[16,32]}', write null, or remove "
    "it.",
    "grid.k=[1,2]": "grid.k=[1,2]: the grid is one setting. Write 'grid={k:[1,2]}'.",
    "+grid={k:1}": "+grid={k:1}: '+' cannot add keys here. Write grid={k:1}.",
    "grid={k:1} grid={k:2}": "grid={k:1} grid={k:2}: grid is given 2 times. Keep one.",
    "grid={k:[]}": "grid k: an empty list. Give it values or remove it.",
    "grid={k:16,k:32}": "grid k: is given 2 times. Keep one.",
    "grid={k:[16,16]}": "grid k: k=16 is given 2 times, and two equal SAEs make no sense. Keep one.",
    "grid={k:[16,16.0]}": "grid k=16 and grid k=16.0: the same SAE. Remove one, or give it another seed.",
    "grid={sparsifier:[mutual_choice,batch_topk],k:[1,2]}": "grid sparsifier=mutual_choice and grid "
    "sparsifier=batch_topk: the same SAE. Remove one, or give it another seed.",
    '\'variants=["k=16","k=16"]\'': 'variants: "k=16" is given 2 times, and two equal SAEs make no sense. Keep one.',
    '\'variants=["k=16","seed=1"]\' grid={k:[1,2]}': 'variants "k=16": grid gives k, too. Keep one.',
    '\'variants=["k=16","seed=1"]\' grid={k:[1,2],layer.index:all}': 'variants "k=16": grid gives k, too. Keep one.',
    "grid={kk:range(1,2),layer.index:all}": "grid kk: takes numbers, texts, true, false, null and lists of these. List "
    "the values one by one, as in kk:[1,2].",
    "grid={kk:[1,2]}": "grid kk: no such key. Did you mean 'k'?",
    "grid={lr:[1,2]}": "grid lr: no such key. Did you mean 'optimizer.lr'?",
    "grid={optimizer.lrr:1}": "grid optimizer.lrr: no such key. Did you mean 'optimizer.lr'?",
    "grid={k:range(1,3)}": "grid k: takes numbers, texts, true, false, null and lists of these. List the values one by "
    "one, as in k:[1,2].",
    "grid={grid:[1]}": "grid grid: an entry holds no further entries. Write them side by side.",
    "'variants=[\"variants=[a]\"]'": 'variants "variants=[a]": variants=[a]: an entry holds no further entries. Write '
    "them side by side.",
    '\'variants=["k=16,32","k=8"]\'': 'variants "k=16,32": k=16,32: several values, and an entry makes one SAE. Make '
    "an entry for each, or use a grid.",
    '\'variants=["k=1 k=2","k=8"]\'': 'variants "k=1 k=2": k=1 k=2: k is given 2 times. Keep one.',
    '\'variants=["+k=1","k=8"]\'': "variants \"+k=1\": +k=1: '+' cannot add keys here. Write k=1.",
    '\'variants=["topk","k=8"]\'': 'variants "topk": topk: not of the form key=value. Did you mean '
    "'sparsifier=topk'?",
    '\'variants=["k=a=b","k=8"]\'': "variants \"k=a=b\": k=a=b: cannot be read. Put the value in quotes: k='a=b'.",
    '\'variants=["sparsifier=topkk","k=8"]\'': 'variants "sparsifier=topkk": sparsifier=topkk: no such sparsifier. '
    "Did you mean 'topk'?",
    '\'variants=["sparsifier=topk k=1.5","k=8"]\'': 'variants "sparsifier=topk k=1.5": k=1.5: every token of '
    "sparsifier=topk keeps a whole number of features. Nearest: 1 or 2.",
    "grid={k:[16,-1],seed:[0,1]}": "grid k=-1: must be positive.",
    "grid={n_features:[20,1024],seed:[0,1]}": "grid n_features=20: k=32: larger than n_features=20. Lower k or raise "
    "n_features.",
    "kk=3 grid={seed:[0,1]}": "kk=3: no such key. Did you mean 'k'?",
    "k=-1 grid={seed:[0,1]}": "k=-1: must be positive.",
    "grid={sparsifier:[gradient,topk],k:[1,2]}": "grid sparsifier=gradient: reads gradients of the language model's "
    "loss (sparsifier=gradient), and other SAEs here do not. One stream harvests them for all SAEs or for none. Make "
    "two runs.",
    "layer.index=all": "layer.index=all: several blocks, which only a grid takes. Write 'grid={layer.index:all}'.",
    "'layer.index=\"every=4\"'": "layer.index=every=4: several blocks, which only a grid takes. Write "
    "'grid={layer.index:\"every=4\"}'.",
    "layer.index=[1,2]": "layer.index=[1,2]: several blocks, which only a grid takes. Write "
    "'grid={layer.index:[1,2]}'.",
    '\'variants=["layer.index=all","k=8"]\'': 'variants "layer.index=all": layer.index=all: several blocks, which '
    "only a grid takes. Write 'grid={layer.index:all}'.",
    "'grid={layer.index:[1,\"every=0\"]}'": "grid layer.index=every=0: not a block. Give an integer (negative counts "
    "from the end) or 'middle'; in a grid also 'all' or 'every=N'.",
    "harvest=tensors harvest.path=x grid={layer:mlp}": "grid layer=mlp: harvest=tensors reads no language model and no "
    "text, so this would change nothing. Remove it.",
    "grid={k:[1,2,3,4,5,6,7,8],seed:[0,1,2,3,4,5,6,7],n_features:[11,12,13,14,15,16,17,18],layer.index:[0,1,2,3,4,5,6,"
    "7,8]}": "variants and grid: 4608 SAEs, and a run has at most 4096. Shorten them.",
    "parallel=saes": "parallel=saes: gives each rank some of the SAEs, and this run has one. Choose parallel=data or "
    "features.",
    "plan.hardware=h100": "plan.hardware=h100: is for the plan that dry_run=true prints, so this would change nothing. "
    "Remove it, or add dry_run=true.",
    "plan.devices=0 dry_run=true": "plan.devices=0: must be at least 1.",
}
"""What is typed in a shell, and the whole message."""


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Return the lines of the message with which the command line refuses its arguments."""
    assert run_command(list(arguments)) == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("typed", MESSAGES)
def test_the_message_says_which_entry_is_wrong(capsys: pytest.CaptureFixture[str], typed: str) -> None:
    assert refused(capsys, *shlex.split(typed)) == [MESSAGES[typed]]


@pytest.mark.parametrize("word", ["tokens=5", "harvest.lanes=3", "model=gpt2", "data.seed=1", "experiment=x",
                                  "hydra.run.dir=x", "tracking=none", "name=x", "plan.devices=2"])  # fmt: skip
def test_an_entry_changes_nothing_of_the_run(capsys: pytest.CaptureFixture[str], word: str) -> None:
    key, _, value = word.partition("=")
    why = (
        "belongs to the run, which has one for all SAEs. Type it outside. An entry may change k, expansion, "
        "n_features, seed, dead_window, layer, sparsifier, budget, nesting, parametrisation, aux_loss, optimizer."
    )
    assert refused(capsys, f'variants=["{word}","k=8"]') == [f'variants "{word}": {word}: {why}']
    assert refused(capsys, f"grid={{{key}:[{value}]}}") == [f"grid {key}: {why}"]


def test_all_problems_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, 'variants=["seed=-1","kk=3","aux_loss=none"]', "grid={k:[16,-2],tokens:[1]}", "tokens=5e6")
    assert sorted(line[:24] for line in lines) == sorted(
        line[:24]
        for line in (
            'variants "kk=3": kk=3: no such key.', "grid tokens: belongs to the run", "grid k=-2: must be positive.",
            "tokens=5e6: not a whole number.", 'variants "seed=-1": seed=-1: must not be negative.',
        )
    )  # fmt: skip


def test_each_point_of_a_sweep_has_its_own_saes() -> None:
    typed = ['grid={layer.index:"every=4"},{layer.index:[1,2]}', "seed=0,1", VARIANTS]
    points = compose_request(typed, sweep=True).points
    assert [(len(point.saes), point.saes[0].seed) for point in points] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert [again(point) for point in points] == [point.saes for point in points]


def again(point: Point) -> tuple[SaeConfig, ...]:
    """Return the SAEs of a point whose arguments are typed again, as a SLURM job gets them."""
    return saes(*point.overrides)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Return a directory for --config-dir with the recipes `mine` and `wrong`."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(RECIPE)
    (tmp_path / "experiment/wrong.yaml").write_text(RECIPE.partition("grid")[0] + "grid: [1]\nvariants: [k=1]\n")
    return tmp_path


def test_a_recipe_may_hold_a_grid_and_typed_ones_replace_it(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = saes("experiment=mine", config_dir=str(recipes))
    assert [(*block(sae), sae.k, sae.sparsifier.name) for sae in found] == [
        (kind, "all", k, "topk") for kind in ("residual", "mlp") for k in (16, 32)
    ]
    found = saes("experiment=mine", "grid={seed:[3,4]}", config_dir=str(recipes))
    assert [(*block(sae), sae.k, sae.seed) for sae in found] == [("residual", "middle", 7, seed) for seed in (3, 4)]
    found = saes("experiment=mine", "grid=null", 'variants=["k=9"]', config_dir=str(recipes))
    assert [sae.k for sae in found] == [9]
    (line,) = refused(capsys, "--config-dir", str(recipes), "experiment=wrong")
    assert line.startswith("grid=[1]: not a mapping")


def test_the_composed_configuration_shows_both_as_they_were_typed(command: Command, recipes: Path) -> None:
    done = command("--config-dir", str(recipes), "--cfg", "job", "experiment=mine", VARIANTS, "grid={seed:[3,4]}")
    assert (done.status, done.stderr) == (0, "")
    shown = done.stdout.partition("dry_run: false\n")[2].partition("model:\n")[0]
    assert shown == "variants:\n- k=16\n- sparsifier=topk k=24\ngrid:\n  seed:\n  - 3\n  - 4\n"
    assert command("--cfg", "job", "grid={kk:1}").stderr == "grid kk: no such key. Did you mean 'k'?\n"
    shown = command("--help").stdout
    for line in ("variants=null", "grid=null", "plan.hardware=null", "parallel: data, features, mesh, saes"):
        assert f"  {line}" in shown


def test_many_saes_are_composed_in_seconds() -> None:
    saes()
    start = time.process_time()
    many = "grid={layer:[residual,mlp,attention],layer.index:[0,1,2,3],n_features:[1024,2048],k:[16,32]}"
    assert len(saes(many)) == 48
    assert time.process_time() - start < 6  # under 3 s on an idle machine
