"""The SAEs of one run: `variants` and `grid` of a point, combined, composed and checked.

Each SAE is composed as a run of its own: the point's overrides, with those replaced that its entries give again. So
every check of a run holds for each SAE. A problem that all SAEs share is reported once.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override

from sae_train.cli import entries
from sae_train.cli.entries import Entry, label
from sae_train.cli.library import Library
from sae_train.cli.overrides import LISTS, check_repeats
from sae_train.cli.parsing import parse
from sae_train.cli.quoting import text_of
from sae_train.config import RunConfig, SaeConfig
from sae_train.errors import ConfigError

MOST_SAES = 4096
"""SAEs of one run that are composed. Composing takes some milliseconds for each."""

Combination = tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lists:
    """`variants` and `grid` of a point, typed or from a recipe. `read_lists` creates it."""

    overrides: list[Override]
    """The point's other overrides."""
    values: Mapping[str, Any]
    """The value of each of the two settings. Where there are problems, `grid` has its usable keys alone."""
    axes: list[list[Entry]]
    """The usable entries: those of `variants`, then those of each key of `grid`."""
    problems: list[str]
    bad: set[str]
    """'variants' or 'grid' where that one has a problem."""


def read_lists(library: Library, point: Sequence[Override]) -> Lists:
    """Return `variants` and `grid` of a point. Those that are typed replace a recipe's."""
    typed = [override for override in point if text_of(override).partition("=")[0] in LISTS]
    others = [override for override in point if override not in typed]
    values = library.recipe(others) | {override.key_or_group: override.value() for override in typed}
    texts = {override.key_or_group: text_of(override).partition("=")[2] for override in typed}
    problems = check_repeats([library.typed(override) for override in typed])
    axes, bad = list[list[Entry]](), {key for key in texts if problems}
    for home, value in values.items():
        if value is None:
            continue
        if problem := entries.shape_problem(home, value, typed=texts.get(home, str(value))):
            found, axes_found = [problem], list[list[Entry]]()
        elif home == "variants":
            variants, found = entries.read_variants(value)
            axes_found = [variants]
        else:
            axes_found, found = entries.read_grid(value)
        axes_found, wrong = _usable(library, axes_found)
        axes += axes_found
        problems += found + wrong
        bad |= {home} if found + wrong else set()
    axes, found = _apart(axes)
    problems += found
    if (count := math.prod(map(len, axes))) > MOST_SAES:
        problems.append(f"variants and grid: {count} SAEs, and a run has at most {MOST_SAES}. Shorten them.")
        axes = []
    if problems:  # of a value that OmegaConf may not take, only the usable keys matter to other checks
        keys = [axis[0].keys[0] for axis in axes if axis[0].home == "grid"]
        values = {"variants": None, "grid": dict.fromkeys(keys)}
    return Lists(overrides=others, values=values, axes=axes, problems=problems, bad=bad)


def _usable(library: Library, axes: list[list[Entry]]) -> tuple[list[list[Entry]], list[str]]:
    """Return the entries whose words are overrides of an SAE's settings, and the problems of the others."""
    found = {
        entry: [p for w in entry.words if (p := entries.word_problem(w, bare=library.unreadable))]
        for axis in axes
        for entry in axis
    }
    kept = [[entry for entry in axis if not found[entry]] for axis in axes]
    return [axis for axis in kept if axis], [_told([entry], each) for entry, told in found.items() for each in told]


def _apart(axes: list[list[Entry]]) -> tuple[list[list[Entry]], list[str]]:
    """Return the axes without keys of `grid` that an entry of `variants` gives, too, and a problem for each of them."""
    variants = [entry for entry in itertools.chain(*axes) if entry.home == "variants"]
    kept, problems = list[list[Entry]](), list[str]()
    for axis in axes:
        keys = axis[0].keys if axis[0].home == "grid" else []
        both = [f"{label([entry])}: grid gives {key}, too. Keep one." for key in keys for entry in variants
                if key in entry.keys]  # fmt: skip
        problems += both
        kept += [] if both else [axis]
    return kept, problems


def check_point(
    library: Library, point: Sequence[Override], *, refused: Collection[str] = ()
) -> tuple[RunConfig | None, tuple[SaeConfig, ...], list[str]]:
    """Return a run's configuration and the settings of its SAEs, or None, nothing and the problems.

    The SAEs are in the order of `variants` first, then of the keys of `grid`, the last one changing fastest. The
    configuration has the settings of the first SAE.

    Args:
        library: the configurations in reach.
        point: the overrides of the run.
        refused: keys of arguments that cannot be read.
    """
    lists = read_lists(library, point)
    refused = {*refused, *lists.bad}
    configs, found = list[RunConfig | None](), list[list[str]]()
    combinations = list(itertools.product(*lists.axes))
    for combination in combinations:
        config, wrong = _composed(library, lists, combination, refused=refused)
        configs.append(config)
        found.append(wrong)
    if len(combinations) == 1:  # a problem that is there without the entries is not theirs
        shared = _composed(library, lists, (), refused=refused)[1] if found[0] else []
        explained = [each if each in shared else _told(combinations[0], each) for each in found[0]]
    else:
        explained = _explained(found, combinations)
    problems = lists.problems + explained
    composed = [config for config in configs if config is not None]
    if not problems:
        problems += _mixed_gradients(composed, combinations) + _equal(composed, combinations)
        problems += _nothing_to_spread(composed)
    return (None, (), problems) if problems else (composed[0], tuple(config.sae for config in composed), [])


def _composed(
    library: Library, lists: Lists, combination: Combination, *, refused: Collection[str]
) -> tuple[RunConfig | None, list[str]]:
    """Return the configuration of a run with one SAE, or None and its problems."""
    words = [word for entry in combination for word in entry.words]
    parsed = [override for word in words if (override := parse(word)) is not None]
    given = {key for entry in combination for key in entry.keys}
    kept = [override for override in lists.overrides if override.key_or_group not in given]
    try:
        return library.check([*kept, *parsed], refused=refused, lists=lists.values)
    except ConfigError as error:  # the composition of this combination of choices
        return None, str(error).splitlines()


def _explained(found: Sequence[Sequence[str]], combinations: Sequence[Combination]) -> list[str]:
    """Return each problem once, with the fewest entries that it depends on.

    Args:
        found: the problems of each combination.
        combinations: the entries of each SAE.
    """
    problems = list[str]()
    for problem in dict.fromkeys(itertools.chain(*found)):
        has = [problem in each for each in found]
        problems += [_told(entries_of, problem) for entries_of in _fewest(has, combinations)]
    return problems


def _fewest(has: Sequence[bool], combinations: Sequence[Combination]) -> list[Combination]:
    """Return the smallest parts of combinations that decide which ones have a property: `[()]` where all have it."""
    axes = range(len(combinations[0]))
    for axes_of in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)):
        parts = [tuple(combination[axis] for axis in axes_of) for combination in combinations]
        having = dict.fromkeys(part for part, holds in zip(parts, has, strict=True) if holds)
        if all(holds == (part in having) for part, holds in zip(parts, has, strict=True)):
            return list(having)
    raise AssertionError("combinations differ in an axis")


def _told(entries_of: Sequence[Entry], problem: str) -> str:
    """Return a problem that begins with its entries."""
    if not entries_of:
        return problem
    last = entries_of[-1]
    said = problem.removeprefix(f"{last.text}: ") if last.home == "grid" else problem  # not "grid k=0: k=0: ..."
    return f"{label(entries_of)}: {said}"


def _mixed_gradients(configs: Sequence[RunConfig], combinations: Sequence[Combination]) -> list[str]:
    """Return the problem of SAEs that read gradients where others do not."""
    has = [config.reads_gradients for config in configs]
    if all(has) or not any(has):
        return []
    return [
        f"{label(part)}: reads gradients of the language model's loss (sparsifier=gradient), and other SAEs here do "
        "not. One stream harvests them for all SAEs or for none. Make two runs."
        for part in _fewest(has, combinations)
    ]


def _equal(configs: Sequence[RunConfig], combinations: Sequence[Combination]) -> list[str]:
    """Return the problem of each SAE whose settings an earlier one has."""
    first, problems = dict[str, Combination](), list[str]()
    for config, combination in zip(configs, combinations, strict=True):
        other = first.setdefault(repr(config.sae), combination)
        differ = [(a, b) for a, b in zip(other, combination, strict=True) if a != b]
        if differ:
            names = [label(each) for each in zip(*differ, strict=True)]
            problems.append(f"{names[0]} and {names[1]}: the same SAE. Remove one, or give it another seed.")
    return list(dict.fromkeys(problems))


def _nothing_to_spread(configs: Sequence[RunConfig]) -> list[str]:
    """Return the problem of `parallel=saes` for one SAE."""
    one = len(configs) == 1 and not (configs[0].grid or {}).keys() & {"layer.index"}
    if not one or configs[0].parallel.layout != "saes":
        return []
    return ["parallel=saes: gives each rank some of the SAEs, and this run has one. Choose parallel=data or features."]
