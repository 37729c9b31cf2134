"""What `hydra/launcher=slurm` asks of SLURM, read from YAML and from `hydra.launcher.key=value`, and checked.

Hydra only says which launcher is meant. Its plugin for submitit is not used: the points are composed and checked here,
and the plugin would compose them again, wait for all of them, return what the first task of each returned, and know
nothing of what is finished already.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from sae_train.errors import suggest
from sae_train.preflight import Typed, empty, signed, suggest_key, wrong_type

GROUP = "hydra/launcher"
PREFIX = "hydra.launcher."
HERE = "basic"
"""Hydra's name for making the runs in this process, one after another: what nobody has to type."""

OURS = {
    "array": "", "error": "", "gpus-per-task": "each task would see one GPU while its local index counts on. ",
    "open-mode": "", "output": "", "requeue": "", "signal": "",
}  # fmt: skip
"""Options of sbatch that are not the user's, and why, where the reason is not that this program sets them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmLauncher:
    """What each job of a sweep gets, and how the sweep is submitted."""

    partition: str | None
    """Partition; null is the cluster's default."""
    account: str | None
    """Account that pays; null is the user's default."""
    hours: float
    """Time limit of a job; a run that needs longer saves, and its job goes back into the queue."""
    nodes: int
    """Nodes of a job."""
    gpus: int
    """GPUs a node, each with a task of its own; 0 is one task a node, on CPUs."""
    cpus_per_task: int
    """CPU cores of each task."""
    memory_gb: float | None
    """Memory a node; null is the partition's default."""
    signal_seconds: int
    """Seconds before the time limit at which a run is told to save; enough to write a checkpoint."""
    max_parallel: int | None
    """Jobs of the sweep that may run at once; null is all of them."""
    extra: dict[str, Any]
    """Further options of sbatch, as in {qos: high, constraint: h100}."""
    wait: bool
    """Whether to stay until all jobs have ended, and tell how; false submits and returns."""
    submit: bool
    """Whether to submit; false only writes the sweep's directory, for slurm/sweep.sbatch."""

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus)

    def problems(self) -> list[str]:
        """Return what is wrong with the values."""
        found = [
            f"{PREFIX}{key}={getattr(self, key)}: must be at least {least}."
            for key, least in (("nodes", 1), ("cpus_per_task", 1), ("gpus", 0), ("signal_seconds", 1),
                               ("max_parallel", 1))
            if getattr(self, key) is not None and getattr(self, key) < least
        ]  # fmt: skip
        for key in ("hours", "memory_gb"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                found.append(f"{PREFIX}{key}={getattr(self, key):g}: must be positive.")
        if 0 < self.hours * 3600 <= self.signal_seconds:
            found.append(
                f"{PREFIX}signal_seconds={self.signal_seconds}: not before the end of {PREFIX}hours={self.hours:g}. "
                "Lower it or raise hours."
            )
        for key in self.extra:
            name = key.replace("_", "-")
            if name in OURS:
                found.append(f"{PREFIX}extra.{key}: {OURS[name] or 'this program sets it itself. '}Remove it.")
            elif key in _KEYS:
                found.append(f"{PREFIX}extra.{key}: has a key of its own. Write {PREFIX}{key}=...")
        return found


_KEYS = [field.name for field in fields(SlurmLauncher)]
_DOTTED = [f"{PREFIX}{key}" for key in _KEYS]


def is_launching(key: str) -> bool:
    """Return whether a key of the command line says how a sweep is launched."""
    return key == GROUP or key.startswith(PREFIX)


def check_launcher(typed: Sequence[Typed], choices: Sequence[str], *, sweep: bool) -> tuple[str, list[str]]:
    """Return which launcher is typed, and what is wrong with how it was asked for."""
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
    """Return the launcher that a choice's values and what was typed over them make, or None and what is wrong."""
    merged: dict[str, Any] = {**values, "extra": dict(values.get("extra") or {})}
    problems = []
    if strange := sorted(merged.keys() - set(_KEYS)) + sorted(set(_KEYS) - merged.keys()):
        return None, [f"{GROUP}: {', '.join(strange)}: a launcher of this program has the keys {', '.join(_KEYS)}."]
    for entry, value in typed:
        field, _, option = entry.key.removeprefix(PREFIX).partition(".")
        if field == "extra" and option:
            merged["extra"][option] = value
        elif field == "extra" and isinstance(value, dict):
            merged["extra"] |= value
        elif field not in _KEYS or option:
            problems.append(f"{entry.text}: no such key.{suggest_key(entry.key, _DOTTED)}")
        elif problem := _wrong(entry, value):
            problems.append(problem)
        else:
            merged[field] = value
    if problems:
        return None, problems
    launcher = SlurmLauncher(**merged)
    found = launcher.problems()
    return (None if found else launcher), found


def takes_text(key: str, value: Any) -> bool:
    """Return whether a number is to be kept as it was typed: where text belongs, and in options of sbatch."""
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
