"""Typed settings of `hydra/launcher=slurm`: from YAML and `hydra.launcher.key=value` to a SlurmLauncher.

Hydra's own plugin for submitit is not used. It would compose the points again, wait for all of them, return only the
result of each job's first task, and start points that are finished already.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from sae_train.cli.overrides import Typed, empty, signed, suggest_key, wrong_type
from sae_train.config.launcher import GROUP, LAUNCHER_KEYS, PREFIX, SlurmLauncher
from sae_train.errors import suggest

HERE = "basic"
"""Hydra's name for runs in this process, one after another. It is the default."""

_DOTTED = [f"{PREFIX}{key}" for key in LAUNCHER_KEYS]


def is_launching(key: str) -> bool:
    """Return whether a key of the command line belongs to the launcher."""
    return key == GROUP or key.startswith(PREFIX)


def check_launcher(typed: Sequence[Typed], choices: Sequence[str], *, sweep: bool) -> tuple[str, list[str]]:
    """Return the typed launcher, and the problems of its settings that need no values."""
    problems = [signed(entry, known=[GROUP, *_DOTTED]) for entry in typed if entry.sign]
    chosen = {entry.value: entry for entry in typed if entry.key == GROUP and not entry.sign}
    if not chosen.keys() - {HERE}:
        problems += [
            f"{entry.text}: without {GROUP}=slurm the runs are made here, one after another, so this would change "
            f"nothing. Add {GROUP}=slurm or remove it."
            for entry in typed
            if entry.key != GROUP and not entry.sign
        ]
        return HERE, problems
    launcher, entry = next(iter(chosen.items()))
    if launcher not in choices:
        problems.append(f"{entry.text}: no such launcher.{suggest(launcher, set(choices) - {HERE})}")
    elif not sweep:
        problems.append(
            f"{entry.text}: sends the runs of a sweep, and this is one run. Add -m, or use slurm/train.sbatch."
        )
    return launcher, problems


def read_launcher(
    values: Mapping[str, Any], typed: Sequence[tuple[Typed, Any]]
) -> tuple[SlurmLauncher | None, list[str]]:
    """Return the launcher from a choice's values and the typed ones over them, or None and its problems."""
    merged: dict[str, Any] = {**values, "extra": dict(values.get("extra") or {})}
    problems = []
    if strange := sorted(merged.keys() - set(LAUNCHER_KEYS)) + sorted(set(LAUNCHER_KEYS) - merged.keys()):
        known = ", ".join(LAUNCHER_KEYS)
        return None, [f"{GROUP}: {', '.join(strange)}: a launcher of this program has the keys {known}."]
    for entry, value in typed:
        field, _, option = entry.key.removeprefix(PREFIX).partition(".")
        if field == "extra" and option:
            merged["extra"][option] = value
        elif field == "extra" and isinstance(value, dict):
            merged["extra"] |= value
        elif field not in LAUNCHER_KEYS or option:
            problems.append(f"{entry.text}: no such key.{suggest_key(entry.key, _DOTTED)}")
        elif problem := _wrong(entry, value):
            problems.append(problem)
        else:
            merged[field] = value
    if problems:
        return None, problems
    launcher = SlurmLauncher(**merged)
    found = launcher.problems(PREFIX)
    return (None if found else launcher), found


def takes_text(key: str, value: Any) -> bool:
    """Return whether a number stays text as it was typed: for a key of text, and in options of sbatch."""
    field, _, option = key.removeprefix(PREFIX).partition(".")
    if field == "extra" and option:
        return not isinstance(value, bool)  # true is an option without a value
    hint = get_type_hints(SlurmLauncher).get(field)
    return str in (hint, *get_args(hint))


def _wrong(entry: Typed, value: Any) -> str | None:
    """Return the problem of a value that its key cannot hold."""
    hint = get_type_hints(SlurmLauncher)[entry.key.removeprefix(PREFIX)]
    expected = get_args(hint) or (hint,)
    if hint == dict[str, Any]:
        return f"{entry.text}: not options of sbatch. Write '{entry.key}={{qos: high}}'."
    if value == "":
        return empty(entry, optional=type(None) in expected)
    if isinstance(value, bool):
        fits = bool in expected
    elif isinstance(value, int | float) and math.isfinite(value):
        fits = float in expected or (int in expected and isinstance(value, int)) or str in expected
    else:
        fits = isinstance(value, tuple(kind for kind in expected if kind is not float))
    return None if fits else wrong_type(entry, expected)
