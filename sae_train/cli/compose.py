"""From the typed arguments to checked RunConfigs: the points of a sweep and their launcher, or what `--help` shows.

Nothing here starts a run or writes a file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from sae_train.cli import launcher
from sae_train.cli.library import CONFIG_NAME, Library, opened
from sae_train.cli.overrides import check_repeats, several_values
from sae_train.cli.parsing import expand
from sae_train.cli.point import Point
from sae_train.cli.quoting import text_of, typed_value
from sae_train.cli.suite import check_point, read_lists
from sae_train.config import RunConfig
from sae_train.config.launcher import GROUP, SlurmLauncher
from sae_train.errors import raise_all


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The runs that the command line asks for. `compose_request` creates it; `train` makes or submits the runs."""

    points: list[Point]
    """The runs, in the order in which a sweep makes them."""
    launcher: SlurmLauncher | None
    """SLURM settings of a sweep; None makes the runs in this process."""


def compose_config(overrides: list[str]) -> RunConfig:
    """Return the configuration of `sae-train` with these overrides. A ConfigError lists every problem."""
    (point,) = compose_request(overrides, sweep=False).points
    return point.config


def compose_request(
    arguments: list[str],
    *,
    sweep: bool,
    config_dir: str | None = None,
    config_name: str = CONFIG_NAME,
    several: Callable[[str], str] = several_values,
) -> Request:
    """Return every run that the arguments ask for, and their launcher.

    Args:
        arguments: the settings, as typed.
        sweep: whether an argument may have several values.
        config_dir: a directory with further choices.
        config_name: the main configuration.
        several: returns the problem of an argument with several values where there is no sweep.

    Raises:
        ConfigError: lists the problems of all points, before anything is loaded or written.
    """
    with opened(config_dir=config_dir, config_name=config_name) as library:
        overrides, refused = library.read(arguments, sweep=sweep, several=several)
        problems = list(refused.values())
        sent, overrides = library.split(overrides)
        where, found = launcher_of(library, sent, sweep=sweep)
        problems += found
        points = list[Point]()
        points_typed = expand(overrides)
        if not points_typed:
            swept = [text_of(override) for override in overrides if override.is_sweep_override()]
            problems.append(f"{' '.join(swept)}: nothing that there is matches, so this sweep has no runs. Type the "
                            "values one by one, as in k=16,32.")  # fmt: skip
        for point in points_typed:
            config, saes, found = check_point(library, point, refused=refused.keys() - {""})
            problems += found
            if config is not None:
                points.append(Point(overrides=[text_of(o) for o in point], config=config, saes=saes))
        raise_all(list(dict.fromkeys(problems)))
    return Request(points=points, launcher=where)


def launcher_of(library: Library, overrides: list[Override], *, sweep: bool) -> tuple[SlurmLauncher | None, list[str]]:
    """Return the launcher of a sweep, None for runs in this process, and the problems of its overrides."""
    typed = [library.typed(override) for override in overrides]
    swept = [f"{text_of(o)}: one launcher submits the whole sweep." for o in overrides if o.is_sweep_override()]
    choice, problems = launcher.check_launcher(typed, library.choices(GROUP), sweep=sweep)
    problems += swept + check_repeats(typed)
    if problems or choice == launcher.HERE:
        return None, problems
    values = [
        (e, typed_value(o) if launcher.takes_text(e.key, o.value()) else o.value())
        for e, o in zip(typed, overrides, strict=True)
        if e.key != GROUP
    ]
    return launcher.read_launcher(library.launcher_values(choice), values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """All settings, as `--help` shows them. `offer` creates it; help.py prints it."""

    values: dict[str, Any]
    """The composed values, nested."""
    choices: dict[str, list[str]]
    """The choices of each group."""
    classes: dict[str, type]
    """The class of config/ of each group's choice."""
    launcher: dict[str, Any]
    """The values of hydra/launcher=slurm."""


def offer(arguments: list[str], *, config_dir: str | None = None, config_name: str = CONFIG_NAME) -> Offer:
    """Return all settings under the arguments' choices. Keys may still lack a value."""
    with opened(config_dir=config_dir, config_name=config_name) as library:
        overrides, refused = library.read(arguments, sweep=False)
        lists = read_lists(library, library.split(overrides)[1])
        draft = library.draft(lists.overrides, lists=lists.values)
        raise_all([*refused.values(), *lists.problems, *draft.problems])
        values = cast(dict[str, Any], OmegaConf.to_container(draft.values))
        return Offer(
            values=values,
            choices={group: library.choices(group) for group in library.groups},
            classes={g: cast(type, OmegaConf.get_type(draft.values, g)) for g in values if g in library.groups},
            launcher=library.launcher_values("slurm"),
        )
