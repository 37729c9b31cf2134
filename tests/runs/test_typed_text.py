"""Typed text stays as it is, advice can be pasted, and one fault gives one problem."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sae_train.cli.compose import launcher_of
from sae_train.cli.library import Library, opened
from sae_train.cli.parsing import expand
from sae_train.cli.quoting import pasted, typed_values
from sae_train.config import RunConfig


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    """Return one library for all tests. It caches compositions."""
    with opened() as found:
        yield found


def points(library: Library, *arguments: str) -> list[RunConfig]:
    """Return the runs of a sweep."""
    overrides, refused = library.read(list(arguments), sweep=True)
    assert refused == {}
    found = [library.check(point) for point in expand(overrides)]
    assert [problems for _, problems in found if problems] == []
    return [config for config, _ in found if config is not None]


def one(library: Library, *arguments: str) -> RunConfig:
    (config,) = points(library, *arguments)
    return config


def complaint(library: Library, *arguments: str) -> list[str]:
    """Return the problems with which the arguments are refused."""
    overrides, refused = library.read(list(arguments), sweep=False)
    _, problems = library.check(overrides, refused=refused.keys())
    return [*refused.values(), *problems]


LOOKS = [
    "2026_11_23",
    "1e3",
    "7e5",
    "1_000",
    "00012",
    "1.50",
    "-0",
    "+5",
    "nan",
    "Inf",
    "true",
    "False",
    "None",
    "0x10",
]


def test_text_that_looks_like_a_number_stays_as_it_was_typed(library: Library) -> None:
    looks = ",".join(LOOKS)
    assert [config.name for config in points(library, f"name={looks},'1e3'")] == [*LOOKS, "1e3"]
    assert [config.runs for config in points(library, f"runs=choice({looks},a)")] == [*LOOKS, "a"]
    for text in LOOKS[:2]:
        config = one(library, "model=huggingface", f"model.id={text}", f"model.revision={text}", f"runs={text}")
        assert (config.model.id, config.model.revision, config.model.name, config.runs) == (text,) * 4
        config = one(library, "data=huggingface", f"data.id={text}", f"data.subset={text}", f"data.split={text}")
        assert (config.data.id, config.data.subset, config.data.split) == (text,) * 3


def test_a_point_of_a_sweep_can_be_typed_again(library: Library) -> None:
    """A SLURM job gets the arguments of its point like this."""
    overrides, _ = library.read(["name=1e3,'1_0'", "layer.index=1,2", "k=1e1"], sweep=True)
    typed = [[str(override.input_line) for override in point] for point in expand(overrides)]
    assert typed[0] == ["name=1e3", "layer.index=1", "k=1e1"]
    assert [one(library, *words).name for words in typed] == ["1e3", "1e3", "1_0", "1_0"]


def test_null_quotes_functions_and_numbers_mean_what_they_did(library: Library) -> None:
    found = [config.name for config in points(library, "name=null,NULL,'null','1e3',' a'")]
    assert found == [None, None, "null", "1e3", " a"]
    assert [one(library, f"name={text}").name for text in ("str(1e3)", "float(3)", "'a,b'")] == ["1000.0", "3.0", "a,b"]
    swept = points(library, "name=range(1,3)", "layer.index=1,2")
    assert [(config.name, config.layer.index) for config in swept] == [("1", 1), ("1", 2), ("2", 1), ("2", 2)]
    overrides, _ = library.read(["k=1e1,2e1"], sweep=True)
    assert [point[0].input_line for point in expand(overrides)] == ["k=10.0", "k=20.0"]
    # as before: the name of a sweep's directory depends on it


def test_text_of_a_launcher_stays_too(library: Library) -> None:
    typed = [f"hydra.launcher.{each}" for each in ("partition=1e3", "extra.qos=1e3", "extra.exclusive=true", "gpus=2")]
    overrides, _ = library.read(["hydra/launcher=slurm", *typed], sweep=True)
    asked, problems = launcher_of(library, overrides, sweep=True)
    assert problems == []
    assert asked is not None
    assert (asked.partition, asked.extra, asked.gpus) == ("1e3", {"qos": "1e3", "exclusive": True}, 2)


def test_lists_are_split_where_the_grammar_splits_them() -> None:
    parts = ["a", r"""'b,"c'""", r'''"d\",e"''', r'''"f\\"''', "[1,2]", "{x:1,y:(2,3)}", r"g\,h", "${i,j}"]
    assert typed_values(" ,".join(parts)) == parts
    assert typed_values("choice(1e3,'a')") == ["1e3", "'a'"]


UNREADABLE = [
    "it's",
    'a "word"',
    """both ' and ".""",
    "a=b",
    "caf\u00e9",
    "a&b",
    "$HOME's",
    "back\\'s`lash`!",
    "end's\\",
]


def test_the_advice_for_an_unreadable_value_works_when_it_is_pasted(library: Library) -> None:
    for value in UNREADABLE:
        (line,) = complaint(library, f"runs={value}")
        before, _, advice = line.partition("these in the shell's: ")
        assert before == f"runs={value}: cannot be read. Put the value in quotes, and "
        assert one(library, *shlex.split(advice.removesuffix("."))).runs == value


def test_the_advice_for_several_values_works_when_it_is_pasted(library: Library) -> None:
    for values in ("a,b", '"it\'s",b'):
        (line,) = complaint(library, f"runs={values}")
        assert line.startswith(f"runs={values}: several values.")
        advice = line.partition("or write ")[2].removesuffix(" for one text.")
        assert one(library, *shlex.split(advice)).runs == values


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@example(value="\\'\"")
@example(value="\\\\'\"\\")
@given(value=TEXTS | st.text("a'\"\\ ,=$`!", min_size=1))
def test_any_text_can_be_pasted(library: Library, value: str) -> None:
    (argument,) = shlex.split(pasted("runs", value))
    ((override,), refused) = library.read([argument], sweep=False)
    assert (override.value(), refused) == (value, {})


def test_a_key_that_cannot_be_read_gets_no_advice_that_fails(library: Library) -> None:
    said = "a b='x: cannot be read. A key is words joined by dots, as in optimizer.lr=1e-3."
    assert complaint(library, "a b='x")[0] == said


ONE_FAULT = {
    "data.id": ["data=files", "data.id=it's"],
    "model.id": ["model=huggingface", "model.id=a=b"],
    "harvest.path": ["harvest=tensors", "harvest.path=a,b"],
    "layer.path": ["layer=module", "layer.path='h"],
    "model": ["model=a=b", "model.id=x"],
    "n_features": ["n_features=1'", "k=100000"],
}


def test_an_argument_that_cannot_be_read_is_the_one_finding(library: Library) -> None:
    for key, typed in ONE_FAULT.items():
        (line,) = complaint(library, *typed)
        assert line.startswith(f"{key}=")


def test_other_findings_stay(library: Library) -> None:
    lines = complaint(library, "data=files", "data.id=it's", "k=-1", "model=huggingface", "seed=1=2")
    heads = [line.partition(":")[0] for line in lines]
    assert heads == ["data.id=it's", "seed=1=2", "model.id is required with model=huggingface", "k=-1"]


@pytest.mark.parametrize("sparsifier", ["topk", "gradient"])
def test_a_token_keeps_no_fraction_of_a_feature(library: Library, sparsifier: str) -> None:
    for k, nearest in {1.5: "1 or 2", 2.5: "2 or 3", 0.4: "1", 0.5: "1", 31.9: "32", 7.25: "7"}.items():
        why = f"every token of sparsifier={sparsifier} keeps a whole number of features. Nearest: {nearest}."
        assert complaint(library, f"sparsifier={sparsifier}", f"k={k}") == [f"k={k}: {why}"]
    typed = [f"sparsifier={sparsifier}", "budget.start_k=8.5", "budget.anneal=0.5"]
    assert complaint(library, *typed) == [f"budget.start_k=8.5: {why.replace('7.', '8 or 9.')}"]


def test_a_fraction_is_a_mean_elsewhere_and_on_the_way_down(library: Library) -> None:
    for sparsifier in ("mutual_choice", "feature_choice"):
        assert one(library, f"sparsifier={sparsifier}", "k=1.5").k == 1.5
    assert one(library, "sparsifier=topk", "k=2", "budget.start_k=5", "budget.anneal=0.5").k == 2


@pytest.mark.usefixtures("library")
def test_a_folder_named_like_a_setting_is_no_group(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert one(Library(config_dir=str(tmp_path), config_name="train"), "runs=elsewhere").runs == "elsewhere"
