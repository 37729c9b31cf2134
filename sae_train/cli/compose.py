"""From what is typed to checked RunConfigs: composition, preflight, the points of a sweep and where they are sent.

Hydra composes the YAML of `conf/`; the dataclasses of config/ are its schemas (schemas.py). Hydra alone accepts
`+typo=1` and stops at the first error; here every argument is checked against the composed keys first, and all findings
come in one message. Nothing here starts a run or writes a file.
"""

import itertools
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sae_train.cli import launcher, refusals
from sae_train.cli.draft import Draft, build, flat, reason
from sae_train.cli.quoting import typed_values
from sae_train.cli.refusals import Typed
from sae_train.cli.schemas import DIALS, holds_text, register_schemas
from sae_train.config import RunConfig
from sae_train.config.launcher import GROUP, SlurmLauncher
from sae_train.config.ranges import Range, ranges
from sae_train.errors import ConfigError, raise_all

CONFIG_MODULE = "sae_train.conf"
CONFIG_NAME = "train"
VERSION_BASE = "1.3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run to make: what was typed for it, and what that composes to."""

    overrides: list[str]
    config: RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the command line asks for."""

    points: list[Point]
    """The runs, in the order in which a sweep makes them."""
    launcher: SlurmLauncher | None
    """Where a sweep's runs are sent; None makes them here."""


def compose_config(overrides: list[str]) -> RunConfig:
    """Return the configuration that `sae-train` would run with these overrides; ConfigError lists every problem."""
    (point,) = compose_request(overrides, sweep=False).points
    return point.config


def compose_request(
    arguments: list[str], *, sweep: bool, config_dir: str | None = None, config_name: str = CONFIG_NAME
) -> Request:
    """Return every run that the arguments ask for, and where they are to be made.

    Raises:
        ConfigError: with the problems of all points, before anything was loaded or written.
    """
    with opened(config_dir=config_dir, config_name=config_name) as library:
        overrides, refused = library.read(arguments, sweep=sweep)
        problems = list(refused.values())
        sent, overrides = library.split(overrides)
        where, found = library.launcher(sent, sweep=sweep)
        problems += found
        configs = []
        points_typed = library.expand(overrides)
        if not points_typed:
            swept = [_text(override) for override in overrides if override.is_sweep_override()]
            problems.append(f"{' '.join(swept)}: nothing that there is matches, so this sweep has no runs. Type the "
                            "values one by one, as in k=16,32.")  # fmt: skip
        for point in points_typed:
            config, found = library.check(point, refused=refused.keys() - {""})
            problems += found
            configs.append((point, config))
        raise_all(list(dict.fromkeys(problems)))
    points = [Point(overrides=[_text(o) for o in point], config=config) for point, config in configs if config]
    return Request(points=points, launcher=where)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What can be set: what `--help` shows."""

    values: dict[str, Any]
    """The composed values, nested."""
    choices: dict[str, list[str]]
    """The names of each group."""
    classes: dict[str, type]
    """The class of config/ that each group is set to."""
    launcher: dict[str, Any]
    """What hydra/launcher=slurm is set to."""


def offer(arguments: list[str], *, config_dir: str | None = None, config_name: str = CONFIG_NAME) -> Offer:
    """Return what can be set once the arguments are; keys that still need a value do not matter."""
    with opened(config_dir=config_dir, config_name=config_name) as library:
        overrides, refused = library.read(arguments, sweep=False)
        draft = library.draft(library.split(overrides)[1])
        raise_all([*refused.values(), *draft.problems])
        values = cast(dict[str, Any], OmegaConf.to_container(draft.values))
        return Offer(
            values=values,
            choices={group: library.choices(group) for group in library.groups},
            classes={g: cast(type, OmegaConf.get_type(draft.values, g)) for g in values if g in library.groups},
            launcher=library.launcher_values("slurm"),
        )


@contextmanager
def opened(*, config_dir: str | None = None, config_name: str = CONFIG_NAME) -> Iterator["Library"]:
    """Open the configurations in reach: the package's, then those of `config_dir`."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir={config_dir}: no such directory.")
    register_schemas()
    with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE):
        yield Library(config_dir=config_dir, config_name=config_name)


class Library:
    """The groups and choices in reach, and what they compose to; lives inside `opened()`."""

    def __init__(self, *, config_dir: str | None, config_name: str) -> None:
        self._search = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"] if config_dir else []
        self._config_name = config_name
        self._parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        self._composed: dict[tuple[str, ...], tuple[DictConfig, dict[str, str]]] = {}
        self._choices: dict[str, list[str]] = {}
        found = {*self._options("", ObjectType.GROUP), "experiment"} - {"hydra", "schema"}
        self.groups = sorted(found - set(DIALS))  # a folder `runs` in --config-dir is no group

    def _options(self, group: str, kind: ObjectType) -> list[str]:
        loader = GlobalHydra.instance().config_loader()
        return loader.get_group_options(group, kind, config_name=self._config_name, overrides=self._search)

    def choices(self, group: str) -> list[str]:
        """Return the names that a group can be set to; those in a folder of it as `folder/name`."""
        if group not in self._choices:
            folders = self._options(group, ObjectType.GROUP)
            inner = [f"{folder}/{choice}" for folder in folders for choice in self.choices(f"{group}/{folder}")]
            self._choices[group] = self._options(group, ObjectType.CONFIG) + inner
        return self._choices[group]

    def read(self, arguments: list[str], *, sweep: bool) -> tuple[list[Override], dict[str, str]]:
        """Return the arguments parsed, and the problems of those that cannot be used, under what tells these apart.

        That is the key, where the argument has one.
        """
        overrides, refused = list[Override](), dict[str, str]()
        for argument in arguments:
            key = argument.partition("=")[0].lstrip("+~").strip()
            try:
                (override,) = self._parser.parse_overrides([argument])
            except HydraException:
                groups = {group: self.choices(group) for group in self.groups}
                problem = refusals.unreadable(argument, groups, is_readable=self._is_readable)
            else:
                if not override.is_sweep_override() or (sweep and override.is_discrete_sweep()):
                    overrides.append(override)
                    continue
                problem = f"{argument}: a sweep needs its values one by one, as in k=16,32."
                if not sweep:
                    problem = refusals.several_values(argument)
            refused[key] = f"{refused[key]}\n{problem}" if key in refused else problem
        return overrides, refused

    def _is_readable(self, argument: str) -> bool:
        """Return whether Hydra's parser takes an argument as one value."""
        try:
            (override,) = self._parser.parse_overrides([argument])
        except HydraException:
            return False
        return not override.is_sweep_override()

    @staticmethod
    def split(overrides: list[Override]) -> tuple[list[Override], list[Override]]:
        """Return what says how a sweep is launched, and the rest."""
        said = [launcher.is_launching(override.key_or_group) for override in overrides]
        parts = list(zip(overrides, said, strict=True))
        return [o for o, launches in parts if launches], [o for o, launches in parts if not launches]

    def launcher(self, overrides: list[Override], *, sweep: bool) -> tuple[SlurmLauncher | None, list[str]]:
        """Return where a sweep is sent, None for nowhere, and what is wrong with how that was typed."""
        typed = [self._typed(override) for override in overrides]
        swept = [f"{_text(o)}: one launcher submits the whole sweep." for o in overrides if o.is_sweep_override()]
        choice, problems = launcher.check_launcher(typed, self.choices(GROUP), sweep=sweep)
        problems += swept + refusals.check_repeats(typed)
        if problems or choice == launcher.HERE:
            return None, problems
        values = [
            (e, _value(o) if launcher.takes_text(e.key, o.value()) else o.value())
            for e, o in zip(typed, overrides, strict=True)
            if e.key != GROUP
        ]
        return launcher.read_launcher(self.launcher_values(choice), values)

    def launcher_values(self, choice: str) -> dict[str, Any]:
        """Return what a launcher's YAML says."""
        said = [*self._search, f"{GROUP}={choice}"]
        composed = compose(self._config_name, said, return_hydra_config=True)
        return cast(dict[str, Any], OmegaConf.to_container(composed.hydra.launcher))

    def expand(self, overrides: list[Override]) -> list[list[Override]]:
        """Return the points of a sweep, the last of the swept keys changing fastest."""
        columns = [
            self._parser.parse_overrides([f"{o.get_key_element()}={value}" for value in self._swept(o)])
            if o.is_sweep_override()
            else [o]
            for o in overrides
        ]
        return [list(point) for point in itertools.product(*columns)]

    def _swept(self, override: Override) -> list[str]:
        """Return the values of a sweep as they are to be parsed; of a key that holds text, each as it was typed.

        Hydra would give a number as it reads it: 1000.0 for 1e3.
        """
        values = list(override.sweep_string_iterator())
        text = _text(override).partition("=")[2].strip()
        if "(" in text.removeprefix("choice(") or not holds_text(override.get_key_element()):
            return values
        typed = typed_values(text)
        return typed if len(typed) == len(values) else values

    def check(self, point: list[Override], *, refused: Collection[str] = ()) -> tuple[RunConfig | None, list[str]]:
        """Return the run's configuration, or None and what is wrong with it.

        Cross-field checks run even where some arguments are wrong; what they then say about the value that
        stands in for a wrong one is left out.

        Args:
            refused: keys of arguments that were refused before.
        """
        draft = self.draft(point, refused=refused)
        for key in [key for key, value in flat(draft.values).items() if value == "???"]:
            group = key.partition(".")[0]
            if not {key, group} & draft.bad and (not draft.reads_tensors or group == "harvest"):
                draft.refuse(key, refusals.missing(key, choice=draft.choices.get(group)))
            if key in refusals.REQUIRED:
                OmegaConf.update(draft.values, key, "?")  # so that the other checks can run
        try:
            run = build(draft.values)
        except ConfigError as error:
            return None, draft.problems + [p for p in str(error).splitlines() if not _mentions(p, draft.bad)]
        return (None if draft.problems else run), draft.problems

    def draft(self, point: list[Override], *, refused: Collection[str] = ()) -> Draft:
        """Return the composed values of a point's usable arguments, and the problems of the others (see `check`)."""
        entries = [self._typed(override) for override in point]
        problems, bad, selections = refusals.check_repeats(entries), set(refused), list[str]()
        for override, entry in zip(point, entries, strict=True):
            if problem := refusals.refused(entry, self.choices):
                problems.append(problem)
                bad.add(entry.key)
            elif not entry.sign and (entry.is_group or override.is_hydra_override()):
                selections.append(_text(override))
        values, choices = self._compose(selections)
        draft = Draft(values=values, choices=choices, problems=problems, bad=bad)
        for override, entry in zip(point, entries, strict=True):
            if entry.sign:
                draft.refuse(entry.key, refusals.signed(entry, known=[*flat(values), *self.groups]))
            elif not (entry.is_group or override.is_hydra_override() or entry.key in bad or entry.group in bad):
                self._apply(draft, entry, override)
        draft.leave_out_replaced(typed={entry.key for entry in entries})
        draft.take_law()
        used = [entry for entry in entries if not bad & {entry.key, entry.group}]
        known = {key: value for key, value in flat(draft.values).items() if key not in bad}
        problems += refusals.never_read(used, tensors=draft.reads_tensors, choices=choices, values=known)
        return draft

    def _typed(self, override: Override) -> Typed:
        signed, _, value = _text(override).partition("=")
        key = signed.lstrip("+~")
        return Typed(sign=signed.removesuffix(key), key=key, value=value, is_group=key in self.groups)

    def _compose(self, selections: list[str]) -> tuple[DictConfig, dict[str, str]]:
        """Return a copy of what these choices compose to, and what each group is then set to."""
        key = tuple(selections)
        if key not in self._composed:
            try:
                composed = compose(self._config_name, [*self._search, *selections], return_hydra_config=True)
            except (HydraException, YAMLError) as error:
                raise ConfigError(reason(error)) from error
            choices = {str(group): str(choice) for group, choice in composed.hydra.runtime.choices.items()}
            OmegaConf.set_struct(composed, False)
            del composed["hydra"]
            self._composed[key] = composed, choices
        values, choices = self._composed[key]
        return deepcopy(values), choices

    def _apply(self, draft: Draft, entry: Typed, override: Override) -> None:
        """Set one value, or note why it cannot be set."""
        value, keys = override.value(), flat(draft.values)
        if entry.key not in keys:
            known, choice = [*keys, *self.groups], draft.choices.get(entry.group)
            homes = [] if choice is None else self._homes(entry.key)
            draft.refuse(entry.key, refusals.unknown_key(entry, known=known, choice=choice, homes=homes))
            return
        parent, _, field = entry.key.rpartition(".")
        owner = cast(type, OmegaConf.get_type(draft.values, parent or None))
        hint, its_range = get_type_hints(owner)[field], ranges(owner).get(field, Range())
        expected = get_args(hint) or (hint,)
        if its_range.null_with:  # this program makes it null, so the message does not offer null
            expected = tuple(kind for kind in expected if kind is not type(None))
        if str in expected:
            value = _value(override)
        try:
            OmegaConf.update(draft.values, entry.key, value)
        except OmegaConfBaseException:
            draft.refuse(entry.key, refusals.wrong_type(entry, expected))
            return
        if value == "":
            draft.refuse(entry.key, refusals.empty(entry, optional=type(None) in expected))
        if float in expected and (isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))):
            draft.refuse(entry.key, refusals.wrong_type(entry, expected))

    def _homes(self, key: str) -> list[str]:
        """Return the choices of the key's group under which the key exists."""
        group = key.partition(".")[0]
        return [choice for choice in self.choices(group) if key in flat(self._compose([f"{group}={choice}"])[0])]


def _text(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _value(override: Override) -> Any:
    """Return an override's value for a setting that may hold text: numbers and truth values as they were typed."""
    value, text = override.value(), _text(override).partition("=")[2].strip()
    return text if isinstance(value, bool | int | float) and "(" not in text else value  # else of a function's


def _mentions(problem: str, keys: set[str]) -> bool:
    return any(re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", problem) for key in keys)
