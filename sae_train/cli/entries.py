"""The entries of `variants` and `grid`: each is a set of overrides that makes an SAE of the run's configuration.

`variants` is a list of entries. Each key of `grid` is a list of entries, one for each of its values. suite.py combines
the entries and composes the SAEs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sae_train.cli.overrides import LISTS, suggest_key
from sae_train.cli.parsing import parse
from sae_train.cli.quoting import grammar_text, quoted, typed_keys, typed_words
from sae_train.cli.schemas import keys_of_an_sae
from sae_train.config import RunConfig, SaeConfig

_SHAPES = {"variants": "a list of texts", "grid": "a mapping from keys to lists"}

_ELSEWHERE = ("experiment", "hydra", "objective", "sweep")
"""First parts of keys that belong to a run and are no fields of RunConfig."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One set of overrides. `read_variants` and `read_grid` create it; suite.py composes an SAE with it."""

    home: str
    """'variants' or 'grid'."""
    text: str
    """The entry as a message shows it: '"sparsifier=topk k=24"' or 'k=16'."""
    words: tuple[str, ...]
    """The overrides."""

    @property
    def keys(self) -> list[str]:
        return [_key(word) for word in self.words]


def label(entries: Sequence[Entry]) -> str:
    """Return the name of some entries in messages: 'variants "k=16"' or 'grid layer=mlp k=16', or both in one."""
    parts = {home: " ".join(entry.text for entry in entries if entry.home == home) for home in LISTS}
    return " ".join(f"{home} {text}" for home, text in parts.items() if text)


def shape_problem(home: str, value: Any, *, typed: str) -> str | None:
    """Return the problem of a value of `variants` or `grid` that is no list or no mapping, or is empty.

    Args:
        home: 'variants' or 'grid'.
        value: the value, as Hydra or a YAML file gives it.
        typed: the value as text.
    """
    example = LISTS[home]
    if not isinstance(value, list if home == "variants" else dict):
        return f"{home}={typed}: not {_SHAPES[home]}. Write {example}, or null."
    if not value:
        return f"{home}={typed}: empty. Give it entries, as in {example}, write null, or remove it."
    if home == "grid":
        keys = typed_keys(typed)
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        return f"grid {repeated[0]}: is given {keys.count(repeated[0])} times. Keep one." if repeated else None
    strange = [each for each in value if not isinstance(each, str)]
    return f"variants={typed}: {strange[0]} is not a text. Write {example}." if strange else None


def read_variants(value: Sequence[str]) -> tuple[list[Entry], list[str]]:
    """Return the entries of `variants`, and their problems."""
    entries = [Entry(home="variants", text=f'"{text}"', words=tuple(typed_words(text))) for text in value]
    return entries, _repeated("variants", entries)


def read_grid(value: dict[Any, Any]) -> tuple[list[list[Entry]], list[str]]:
    """Return a list of entries for each key of `grid`, and the problems."""
    axes, problems = [], []
    for key, given in value.items():
        values = given if isinstance(given, list) else [given]
        axis = f"grid {key}"
        if not all(map(_is_value, values)):
            problems.append(f"{axis}: takes numbers, texts, true, false, null and lists of these. List the values one "
                            f"by one, as in {key}:[1,2].")  # fmt: skip
        elif not values:
            problems.append(f"{axis}: an empty list. Give it values or remove it.")
        elif problem := key_problem(str(key)):
            problems.append(f"{axis}: {problem}")
        else:
            entries = [
                Entry(home="grid", text=f"{key}={_shown(each)}", words=(f"{key}={grammar_text(each)}",))
                for each in values
            ]
            axes.append(entries)
            problems += _repeated(axis, entries)
    return axes, problems


def word_problem(word: str, *, bare: Callable[[str], str]) -> str | None:
    """Return the problem of one word of an entry that is no override of an SAE's setting.

    Args:
        word: such as 'k=16'.
        bare: returns the problem of a word without '='.
    """
    if "=" not in word:
        return bare(word)
    key, _, value = word.partition("=")
    override = parse(word)
    if override is None:
        can_quote = parse(f"{key}={quoted(value)}") is not None
        advice = f"Put the value in quotes: {key}={quoted(value)}." if can_quote else "A key is words joined by dots."
        return f"{word}: cannot be read. {advice}"
    if problem := key_problem(_key(word)):
        return f"{word}: {problem}"
    if override.is_sweep_override():
        return f"{word}: several values, and an entry makes one SAE. Make an entry for each, or use a grid."
    return None


def key_problem(key: str) -> str | None:
    """Return the problem of a key that does not belong to an SAE."""
    known, root = keys_of_an_sae(), key.partition(".")[0]
    if key in known:
        return None
    if root in LISTS:
        return "an entry holds no further entries. Write them side by side."
    if root in {field.name for field in fields(RunConfig)} - {field.name for field in fields(SaeConfig)} | {
        *_ELSEWHERE
    }:
        own = ", ".join(field.name for field in fields(SaeConfig))
        return f"belongs to the run, which has one for all SAEs. Type it outside. An entry may change {own}."
    return f"no such key.{suggest_key(key, known)}"


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~").strip()


def _repeated(home: str, entries: Sequence[Entry]) -> list[str]:
    texts = [entry.text for entry in entries]
    return [
        f"{home}: {text} is given {texts.count(text)} times, and two equal SAEs make no sense. Keep one."
        for text in dict.fromkeys(texts)
        if texts.count(text) > 1
    ]


def _is_value(value: Any) -> bool:
    """Return whether a value of a grid is one that a setting may have: no mapping and no sweep of Hydra's."""
    if isinstance(value, list):
        return all(_is_value(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else grammar_text(value)
