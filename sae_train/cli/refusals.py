"""What was typed, checked before anything is composed or loaded: signs, names, and settings that nothing would read.

Plain strings in, problems out; every finding is one sentence or two in the style of errors.py, and all of them
are reported together.
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
    """One `key=value` of the command line, as it holds for one run."""

    sign: str
    """What stood before the key: nothing, '+', '++' or '~'."""
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


NOT_BUILT_KEYS = {
    "variants": "several SAEs in one run are not built yet. Start one run for each; `-m` makes a sweep of them.",
    "objective": "other objectives than reconstruction are not built yet. Remove it.",
    "sweep": "sweeps kept in a file are not built yet. Type the values with -m, as in `-m k=16,32`.",
}
"""Keys and groups that the design promises and this version lacks."""

_LAYOUTS = "not built yet: it is for several SAEs in one run. Choose parallel=data, features or mesh."

NOT_BUILT_CHOICES = {
    "harvest": {"store": "the activation store is not built yet. Choose harvest=live or harvest=tensors."},
    "parallel": {"saes": _LAYOUTS},
}
"""Choices that the design promises and this version lacks."""

UNUSED_HYDRA = ("hydra/sweeper", "hydra.sweeper", "hydra.sweep", "hydra.run", "hydra.mode")
"""Settings of Hydra's own runner: this program composes with Hydra and makes the runs itself."""


def refused(entry: Typed, choices: Callable[[str], Sequence[str]]) -> str | None:
    """Return the problem that can be seen without composing: not built yet, or a choice that does not exist."""
    problem = not_built(entry)
    if problem is None and entry.is_group and not entry.sign:
        problem = check_choice(entry, choices(entry.key))
    return problem


def signed(entry: Typed, *, known: Iterable[str]) -> str:
    """Return the problem of `+key`, `++key` and `~key`: nothing is added or deleted here."""
    if entry.sign == "~":
        return f"{entry.text}: '~' cannot remove keys here, every one is needed. Remove it."
    if entry.key in known:
        return f"{entry.text}: '{entry.sign}' cannot add keys here. Write {entry.key}={entry.value}."
    near = suggest_key(entry.key, known)
    return f"{entry.text}: '{entry.sign}' cannot add keys here, and there is no such key.{near}"


def check_repeats(typed: Sequence[Typed]) -> list[str]:
    """Return a problem for every key that was given more than once."""
    keys = [entry.key for entry in typed]
    return [
        f"{' '.join(e.text for e in typed if e.key == key)}: {key} is given {keys.count(key)} times. Keep one."
        for key in dict.fromkeys(keys)
        if keys.count(key) > 1
    ]


def not_built(entry: Typed) -> str | None:
    """Return the problem if this names something that is promised and not there yet."""
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
    """Return the problem if a group has no such choice."""
    if entry.value in choices or (entry.key == "experiment" and entry.value == "null"):
        return None
    if not choices:
        return (
            f"{entry.text}: there are no {entry.key}s here. "
            f"Put {entry.value}.yaml into DIR/{entry.key}/ and add --config-dir=DIR."
        )
    return f"{entry.text}: no such {entry.key}.{suggest(entry.value, choices)}"


def unknown_key(entry: Typed, *, known: Iterable[str], choice: str | None, homes: Sequence[str]) -> str:
    """Return the problem of a key that this run does not have.

    `choice` is what the key's group is set to (None: there is no such group); `homes` are the choices of
    that group under which the key exists.
    """
    group, _, field = entry.key.partition(".")
    if homes:
        return (
            f"{entry.text}: {group}={choice} has no {field!r}, so this would change nothing. "
            f"Remove it, or choose {' or '.join(f'{group}={home}' for home in homes)}."
        )
    return f"{entry.text}: no such key.{suggest_key(entry.key, known)}"


def suggest_key(word: str, known: Iterable[str]) -> str:
    """Like `suggest`, for dotted keys: the last part alone finds its key, and a group lists its own."""
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
    """Return the problem of a value that is none of the `expected` types."""
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
    """Return the problem of an argument that is no `key=value`.

    Args:
        is_readable: whether an argument, as a shell hands it over, is one.
    """
    if "=" not in argument:
        return _bare_word(argument, groups)
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


def never_read(
    typed: Sequence[Typed], *, tensors: bool, choices: Mapping[str, str], values: Mapping[str, object]
) -> list[str]:
    """Return a problem for every setting that exists but that this run would never read.

    `tensors`: whether activations are read from files; `choices`: what each group is set to; `values`: the composed
    values by dotted key, without those that were refused.
    """
    found = [problem for entry in typed if (problem := _never_read(entry, tensors=tensors, choices=choices))]
    found += [
        f"{entry.text}: n_features={values['n_features']} is the width already, so this would change nothing. Keep one."
        for entry in typed
        if entry.key == "expansion" and values.get("n_features") is not None
    ]
    found += [
        f"{entry.text}: {why} {other}={value}, so this would change nothing. Remove it, or "
        f"{'lower' if value else 'raise'} {other}."
        for entry in typed
        for key, other, value, why in READ_UNLESS
        if entry.key == key and values.get(other) == value
    ]
    return found


def _never_read(entry: Typed, *, tensors: bool, choices: Mapping[str, str]) -> str | None:
    if tensors and entry.group in ("model", "layer", "data") and entry.key not in ("data.seed", "data.repeat"):
        return (
            f"{entry.text}: harvest=tensors reads no language model and no text, so this would change nothing. "
            "Remove it."
        )
    for (group, choice), (fields, advice) in FIXED_BY_CHOICE.items():
        if entry.group == group and choices.get(group) == choice and entry.key.partition(".")[2] in fields:
            return f"{entry.text}: {advice}"
    if entry.key in NAMES_OF_CHOICES:
        return f"{entry.text}: says which choice this is and does not change it. Write {entry.group}={entry.value}."
    return None


FIXED_BY_CHOICE = {
    ("model", "bundled"): (
        ("id", "revision"),
        "model=bundled is the language model inside the package. Add model=huggingface for one of your own.",
    ),
    ("data", "bundled"): (
        ("id", "subset", "split", "held_out_split", "text_column"),
        "data=bundled is the corpus inside the package. Add data=files for text of your own, or data=huggingface "
        "for a dataset of the hub.",
    ),
    ("data", "files"): (
        ("subset", "split"),
        "data=files has no subsets or splits, so this would change nothing. Remove it; data.held_out_split=PATH "
        "names held-out text.",
    ),
}
"""Fields of a group that a choice fixes or does not have, and what to do instead."""

_LAW = "says which features are underused, and only dead ones count at"

_FALL = "says how p falls, and it never does at"

READ_UNLESS = (
    ("aux_loss.exponent", "aux_loss.tau", 0, _LAW),
    ("aux_loss.shift", "aux_loss.tau", 0, _LAW),
    ("sparsifier.revival", "optimizer.decay_tokens", 0, "acts while the learning rate decays, and it never does at"),
    ("sparsifier.start", "sparsifier.end", 1, _FALL),
    ("sparsifier.changes", "sparsifier.end", 1, _FALL),
    ("sparsifier.end", "sparsifier.start", 1, _FALL),
    ("sparsifier.changes", "sparsifier.start", 1, _FALL),
)
"""Fields that nothing reads where another has a value: key, that other, the value, and why. aux_loss.hard may be given:
at tau 0 every weight is hard."""

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
"""Keys by which a saved configuration tells what its groups were set to."""

REQUIRED = {
    "model.id": "a Hub id such as Qwen/Qwen3-0.6B, or a local directory in Hugging Face layout",
    "data.id": "a Hub id such as roneneldan/TinyStories (data=huggingface), or a file or directory (data=files)",
    "harvest.path": "a directory of *.safetensors files, each with a tensor 'activations' [n, d_model]",
    "layer.path": "a dotted name of model.named_modules(), such as transformer.h.3.ln_2",
}
"""What to give for the keys that have no value until they are typed."""


def missing(key: str, *, choice: str | None) -> str:
    """Return the problem of a key without a value; `choice` is what its group is set to."""
    where = f" with {key.partition('.')[0]}={choice}" if choice else ""
    return f"{key} is required{where}: {REQUIRED.get(key, 'it has no default')}. Add {key}=..."
