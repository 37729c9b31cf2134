"""Errors that a user can act on, and the search for the name that was meant.

A message says what was given, what is wrong, what is allowed and what to do. The command line prints
these without a traceback and exits with `status`; every other exception is our fault and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something outside this program is wrong; the message says what to do about it."""

    status = 2


class ConfigError(UserError):
    """A setting is wrong. Several independent findings are joined by newlines."""


class DataError(UserError):
    """Text, activations or a language model cannot be used as they are."""


class CheckpointError(UserError):
    """A run's directory or a checkpoint cannot be read or written."""


class DirectoryInUse(CheckpointError):
    """Another process is training in a run's directory."""


class StoppedByNumbers(UserError):
    """The loss or a gradient is not finite, or the dictionary collapsed: training cannot go on."""

    status = 3


class RankLost(UserError):
    """Another process of the run is gone; this one cannot go on alone."""

    status = 1


class Preempted(UserError):
    """The run was told to stop, and has saved what it needs to go on."""

    status = 75


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` with at most three near names, else the names there are; starts with a space."""
    names = sorted(set(known))
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    if 0 < len(names) <= 24:
        return f" Known: {', '.join(names)}."
    return ""


def raise_all(problems: list[str]) -> None:
    """Raise one ConfigError that lists every problem, or return when there is none."""
    if problems:
        raise ConfigError("\n".join(problems))
