"""`sae_train.train`: one run in the calling process, such as a notebook.

The settings go the way of the command line, so the run has the same identity, directory and weights. The process is
the user's: its signal handlers, number of threads, torch's switches and Hydra are the same before and after.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from sae_train.cli.compose import compose_request
from sae_train.cli.quoting import quoted
from sae_train.cli.typed_settings import settings_texts
from sae_train.errors import ConfigError, DirectoryInUse, Preempted, UserError
from sae_train.ranks.launcher_env import this_process
from sae_train.ranks.threads import borrowed_threads
from sae_train.training import signals

if TYPE_CHECKING:
    from sae_train.cli.point import Point
    from sae_train.training.finished_run import Run

_one_run = threading.Lock()
"""Held while this process trains."""


def train(*settings: str | Mapping[str, Any], config_dir: str | Path | None = None, **more: Any) -> "Run":
    """Train in this process, or resume, and return the run. A run that is finished already is returned at once.

    Example: `train("sparsifier=topk", k=32, harvest={"context_length": 128})`.

    Args:
        settings: each a text as on the command line, or a mapping from keys to values. A mapping inside a mapping is a
            group. `variants` takes a list of texts or mappings, and `grid` a mapping from keys to lists.
        config_dir: a directory with choices and recipes of your own, as `--config-dir`.
        more: further settings.

    Returns:
        The run. Some of its SAEs may have been stopped by the numbers; `run.summary` has the reasons.

    Raises:
        UserError: with the message that the command line prints. ConfigError lists all problems of the settings.
        StoppedByNumbers: every SAE was stopped.
        DirectoryInUse: another process, or another thread of this one, is training.
        KeyboardInterrupt: after an interrupt, once the run is saved. The same call goes on. A second interrupt does
            not wait for that.
        Preempted: after SIGTERM, SIGUSR1 or SIGUSR2, once the run is saved.
    """
    if not _one_run.acquire(blocking=False):
        raise DirectoryInUse(
            "sae_train.train: another thread of this process is training. A process makes one run at a time. Wait for "
            "it, or train in another process."
        )
    try:
        return _trained(_checked([*settings, *([more] if more else [])], config_dir=config_dir))
    except UserError as error:
        raise error.with_traceback(None) from None  # its message is all that a user needs
    finally:
        _one_run.release()


def _checked(settings: list[str | Mapping[str, Any]], *, config_dir: str | Path | None) -> "Point":
    """Return the run that the settings mean.

    Raises:
        ConfigError: lists the problems.
    """
    process = this_process()
    if process.size > 1:
        raise ConfigError(
            f"sae_train.train: makes a run of one process, and {process.launcher} started {process.size}. Start ranks "
            "with `python -m sae_train` as the program."
        )
    texts = settings_texts(settings)
    with _own_hydra():
        folder = None if config_dir is None else str(config_dir)
        (point,) = compose_request(texts, sweep=False, config_dir=folder, several=_several_values).points
    if point.config.dry_run:
        raise ConfigError(
            "dry_run=true: sae_train.train returns a run, and a plan makes none. Type `sae-train dry_run=true` with "
            "the other settings on the command line."
        )
    return point


def _several_values(text: str) -> str:
    """Return the problem of a list with commas, which is a sweep on the command line."""
    key, _, value = text.partition("=")
    return (
        f"{text}: several values, and sae_train.train makes one run. Call it once for each value, make several SAEs of "
        f"one run with grid={{{key!r}: [...]}}, or write {key}={quoted(value)} for one text."
    )


def _trained(point: "Point") -> "Run":
    """Make a run; see `train`."""
    paths: list[Path] = []
    with borrowed_threads(), signals.borrowed():
        from sae_train.training.finished_run import Run
        from sae_train.training.plain_torch import plain_torch
        from sae_train.training.run import run

        try:
            with plain_torch():
                run(point.config, saes=point.saes, overrides=point.overrides, entered=paths.append)
        except Preempted as error:
            message = str(error).replace("same command", "same call")
            raise (KeyboardInterrupt if signals.is_interrupt() else Preempted)(message) from None
        except KeyboardInterrupt:  # the second one
            raise KeyboardInterrupt("Interrupted. The same call goes on from the last checkpoint.") from None
    made = Run(paths[-1])
    made.check_usable()
    return made


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Set the Hydra that the user's code has initialised aside, and put it back at the end of the block."""
    base, theirs = VersionBase.instance().getbase(), GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = theirs
        VersionBase.instance().version_base = base
