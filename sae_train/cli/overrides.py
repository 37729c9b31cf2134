"""Checks of typed overrides: signs, names, types, and settings that nothing would read.

Each function takes plain strings and returns problems as messages. All problems are reported together. The checks of
values are in config/ (see its docstring for the home of each check).
"""

import difflib
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sae_train.cli.quoting import pasted
from sae_train.errors import suggest


@dataclass(frozen=True, kw_only=True, slots=True)
class Typed:
    """One `key=value` of the command line, as it holds for one run. `Library` creates it; the checks here read it."""

    sign: str
    """The sign before the key: nothing, '+', '++' or '~'."""
    key: str
    value: str
    is_group: bool
    """Whether the key names a group of `conf/`, so that the value is the name of a choice."""

    @property
    def text(self) -> str:
        return f"{self.sign}{self.key}={self.value}" if self.value or self.sign != "~" else f"~{self.key}"

    @property
    def group(self) -> str:
        return self.key.partition(".")[0]


LISTS = {
    "variants": """'variants=["k=16","sparsifier=topk k=24"]'""",
    "grid": "'grid={layer:[residual,mlp],k:[16,32]}'",
}
"""The settings that make several SAEs of a run, each with an example as a shell takes it."""

NOT_BUILT_KEYS = {
    "objective": "other objectives than reconstruction are not built yet. Remove it.",
    "sweep": "sweeps kept in a file are not built yet. Type the values with -m, as in `-m k=16,32`.",
}
"""Keys and groups that are planned and not built yet."""

NOT_BUILT_CHOICES = {
    "harvest": {"store": "the activation store is not built yet. Choose harvest=live or harvest=tensors."},
}
"""Choices that are planned and not built yet."""

UNUSED_HYDRA = ("hydra/sweeper", "hydra.sweeper", "hydra.sweep", "hydra.run", "hydra.mode")
"""Settings of Hydra's own runner, which is not used."""


def refused_choice(entry: Typed, choices: Callable[[str], Sequence[str]]) -> str | None:
    """Return the problem of a choice or key that is not built yet, or of a choice that does not exist."""
    problem = not_built(entry)
    if problem is None and entry.is_group and not entry.sign:
        problem = check_choice(entry, choices(entry.key))
    return problem


def signed(entry: Typed, *, known: Iterable[str]) -> str:
    """Return the problem of `+key`, `++key` or `~key`: overrides add and delete no keys."""
    if entry.sign == "~":
        return f"{entry.text}: '~' cannot remove keys here, every one is needed. Remove it."
    if entry.key in known:
        return f"{entry.text}: '{entry.sign}' cannot add keys here. Write {entry.key}={entry.value}."
    near = suggest_key(entry.key, known)
    return f"{entry.text}: '{entry.sign}' cannot add keys here, and there is no such key.{near}"


def check_repeats(typed: Sequence[Typed]) -> list[str]:
    """Return a problem for each key that is given more than once."""
    keys = [entry.key for entry in typed]
    return [
        f"{' '.join(e.text for e in typed if e.key == key)}: {key} is given {keys.count(key)} times. Keep one."
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1
    ]


def not_built(entry: Typed) -> str | None:
    """Return the problem of a key or choice that is promised and not built yet."""
    root = entry.key.partition(".")[0]
    for key in (entry.key, root):
        if key in NOT_BUILT_KEYS:
            return f"{entry.text}: {NOT_BUILT_KEYS[key]}"
    reason = NOT_BUILT_CHOICES.get(entry.key, {}).get(entry.value)
    if reason:
        return f"{entry.text}: {reason}"
    if any(entry.key == key or entry.key.startswith(f"{key}.") for key in UNUSED_HYDRA):
        return f"{entry.text}: this program makes its runs itself, so this would change nothing. Remove it."
    return None


def check_choice(entry: Typed, choices: Sequence[str]) -> str | None:
    """Return the problem of a choice that its group does not have."""
    if entry.value in choices or (entry.key == "experiment" and entry.value == "null"):
        return None
    return f"{entry.text}: no such {entry.key}.{suggest(entry.value, choices)}"


def unknown_key(entry: Typed, *, known: Iterable[str], choice: str | None, homes: Sequence[str]) -> str:
    """Return the problem of a key that this run does not have.

    Args:
        known: all keys and groups of this run.
        choice: the choice of the key's group; None where there is no such group.
        homes: the choices of that group under which the key exists.
    """
    group, _, field = entry.key.partition(".")
    if group == "grid":
        return f"{entry.text}: the grid is one setting. Write 'grid={{{field}:{entry.value}}}'."
    if homes:
        return (
            f"{entry.text}: {group}={choice} has no {field!r}, so this would change nothing. "
            f"Remove it, or choose {' or '.join(f'{group}={home}' for home in homes)}."
        )
    return f"{entry.text}: no such key.{suggest_key(entry.key, known)}"


def suggest_key(word: str, known: Iterable[str]) -> str:
    """Return a suggestion as `suggest` does, for dotted keys.

    A last part alone finds its key. Where nothing is near, the keys of the group are listed.
    """
    names = sorted(set(known) - set(NAMES_OF_CHOICES))
    group, dot, last = word.rpartition(".")
    inside = [name for name in names if name.startswith(f"{group}.")] if dot else []
    near = [name for name in names if name.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(word, [name for name in names if "." in name or not dot], n=3)
    if inside:
        near = [f"{group}.{n}" for n in difflib.get_close_matches(last, [n.rpartition(".")[2] for n in inside], n=3)]
    near = [name for name in near if name.partition(".")[0] == name or name.partition(".")[0] not in near]
    if near:
        return f" Did you mean {' or '.join(map(repr, near[:3]))}?"
    return f" Known: {', '.join(inside)}." if inside else " `sae-train --help` lists the keys."


WORDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}


def wrong_type(entry: Typed, expected: Sequence[type]) -> str:
    """Return the problem of a value that has none of the `expected` types."""
    hint = ""
    if int in expected:
        try:
            number = float(entry.value)
        except ValueError:
            number = math.nan
        if number.is_integer():
            hint = f" Write {entry.key}={number:.0f}."
    return f"{entry.text}: not {' or '.join(WORDS.get(kind, kind.__name__) for kind in expected)}.{hint}"


def empty(entry: Typed, *, optional: bool) -> str:
    """Return the problem of an empty text."""
    return f"{entry.text}: empty. Give it a value{', write null,' if optional else ''} or remove it."


def several_values(text: str) -> str:
    """Return the problem of a comma list without -m."""
    return f"{text}: several values. Add -m to make a run for each, or write {_pasted(text)} for one text."


def unreadable(argument: str, groups: Mapping[str, Sequence[str]], *, is_readable: Callable[[str], bool]) -> str:
    """Return the problem of an argument that is not of the form `key=value`.

    Args:
        is_readable: whether Hydra reads an argument, without a shell's quotes, as `key=value`.
    """
    if "=" not in argument:
        return _bare_word(argument, groups)
    key = argument.partition("=")[0].strip()
    if key in LISTS:
        return f"{argument}: cannot be read. A shell changes quotes and braces, so quote all of it: {LISTS[key]}."
    advice = _pasted(argument)
    if not is_readable(shlex.split(advice)[0]):
        return f"{argument}: cannot be read. A key is words joined by dots, as in optimizer.lr=1e-3."
    return f"{argument}: cannot be read. Put the value in quotes, and these in the shell's: {advice}."


def _pasted(argument: str) -> str:
    key, _, value = argument.partition("=")
    return pasted(key, value)


def _bare_word(word: str, groups: Mapping[str, Sequence[str]]) -> str:
    homes = [group for group, choices in groups.items() if word in choices]
    hint = f" Did you mean {' or '.join(repr(f'{group}={word}') for group in homes)}?" if homes else ""
    if not homes:
        near = difflib.get_close_matches(word, groups, n=1)
        hint = f" Did you mean '{near[0]}=CHOICE'?" if near else ""
    return f"{word}: not of the form key=value.{hint}"


NAMES_OF_CHOICES = (
    "aux_loss.name",
    "budget.name",
    "harvest.source",
    "layer.kind",
    "nesting.name",
    "optimizer.name",
    "parallel.layout",
    "parametrisation.name",
    "sparsifier.name",
    "tracking.name",
)
"""Keys under which a saved configuration holds the choice of each group."""

REQUIRED = {
    "model.id": "a Hub id such as Qwen/Qwen3-0.6B, or a local directory in Hugging Face layout",
    "data.id": "a Hub id such as roneneldan/TinyStories (data=huggingface), or a file or directory (data=files)",
    "harvest.path": "a directory of *.safetensors files, each with a tensor 'activations' [n, d_model]",
    "layer.path": "a dotted name of model.named_modules(), such as transformer.h.3.ln_2",
}
"""Description of a value for each key that has none until it is typed."""


def missing(key: str, *, choice: str | None) -> str:
    """Return the problem of a key without a value; `choice` is the choice of its group."""
    where = f" with {key.partition('.')[0]}={choice}" if choice else ""
    return f"{key} is required{where}: {REQUIRED.get(key, 'it has no default')}. Add {key}=..."
