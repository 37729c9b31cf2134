"""The configurations in reach, and the composition of one point from them.

Hydra composes the YAML of `conf/`; the dataclasses of config/ are its schemas (schemas.py). Hydra alone accepts
`+typo=1` and stops at the first error. Here every argument is first compared with the composed keys, and all problems
come in one message.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sae_train.cli import launcher
from sae_train.cli.never_read import never_read
from sae_train.cli.overrides import (
    LISTS,
    REQUIRED,
    Typed,
    check_repeats,
    empty,
    missing,
    refused_choice,
    several_values,
    signed,
    unknown_key,
    unreadable,
    wrong_type,
)
from sae_train.cli.parsing import is_one_value, parse
from sae_train.cli.point import DraftPoint, build, flat, reason
from sae_train.cli.quoting import text_of, typed_value
from sae_train.cli.schemas import DIALS, register_schemas
from sae_train.config import RunConfig
from sae_train.config.launcher import GROUP
from sae_train.config.ranges import Range, ranges
from sae_train.errors import ConfigError

CONFIG_MODULE = "sae_train.conf"
CONFIG_NAME = "train"
VERSION_BASE = "1.3"


@contextmanager
def opened(*, config_dir: str | None = None, config_name: str = CONFIG_NAME) -> Iterator["Library"]:
    """Open the configurations in reach: the package's, then the ones of `config_dir`."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError(f"--config-dir={config_dir}: no such directory.")
    register_schemas()
    with initialize_config_module(CONFIG_MODULE, version_base=VERSION_BASE):
        yield Library(config_dir=config_dir, config_name=config_name)


class Library:
    """The groups and choices in reach, and their composition. `opened()` creates it; compose.py uses it."""

    def __init__(self, *, config_dir: str | None, config_name: str) -> None:
        self._search = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"] if config_dir else []
        self._config_name = config_name
        self._composed: dict[tuple[str, ...], tuple[DictConfig, dict[str, str]]] = {}
        self._choices: dict[str, list[str]] = {}
        found = {*self._options("", ObjectType.GROUP)} - {"hydra", "schema"}
        self.groups = sorted(found - set(DIALS))  # a folder `runs` in --config-dir is no group

    def _options(self, group: str, kind: ObjectType) -> list[str]:
        loader = GlobalHydra.instance().config_loader()
        return loader.get_group_options(group, kind, config_name=self._config_name, overrides=self._search)

    def choices(self, group: str) -> list[str]:
        """Return the choices of a group. A choice in a folder of the group is `folder/name`."""
        if group not in self._choices:
            folders = self._options(group, ObjectType.GROUP)
            inner = [f"{folder}/{choice}" for folder in folders for choice in self.choices(f"{group}/{folder}")]
            self._choices[group] = self._options(group, ObjectType.CONFIG) + inner
        return self._choices[group]

    def read(
        self, arguments: list[str], *, sweep: bool, several: Callable[[str], str] = several_values
    ) -> tuple[list[Override], dict[str, str]]:
        """Return the arguments that can be used, parsed, and the problem of each other one by its key.

        Args:
            sweep: whether an argument may have several values.
            several: returns the problem of an argument with several values where there is no sweep.
        """
        overrides, refused = list[Override](), dict[str, str]()
        for argument in arguments:
            key = argument.partition("=")[0].lstrip("+~").strip()
            override = parse(argument)
            if override is None:
                problem = self.unreadable(argument)
            elif not override.is_sweep_override() or (sweep and override.is_discrete_sweep()):
                overrides.append(override)
                continue
            else:
                problem = f"{argument}: a sweep needs its values one by one, as in k=16,32."
                if not sweep:
                    problem = several(argument)
            if key in refused and key not in LISTS:  # a shell makes many arguments of one grid: one message is enough
                problem = f"{refused[key]}\n{problem}"
            refused[key] = refused.get(key, problem) if key in LISTS else problem
        return overrides, refused

    def unreadable(self, argument: str) -> str:
        """Return the problem of an argument that Hydra's parser cannot read."""
        groups = {group: self.choices(group) for group in self.groups}
        return unreadable(argument, groups, is_readable=is_one_value)

    @staticmethod
    def split(overrides: list[Override]) -> tuple[list[Override], list[Override]]:
        """Return the overrides of the launcher, and the others."""
        said = [launcher.is_launching(override.key_or_group) for override in overrides]
        parts = list(zip(overrides, said, strict=True))
        return [o for o, launches in parts if launches], [o for o, launches in parts if not launches]

    def launcher_values(self, choice: str) -> dict[str, Any]:
        """Return the values of a launcher's YAML."""
        said = [*self._search, f"{GROUP}={choice}"]
        composed = compose(self._config_name, said, return_hydra_config=True)
        return cast(dict[str, Any], OmegaConf.to_container(composed.hydra.launcher))

    def check(
        self, point: Sequence[Override], *, refused: Collection[str] = (), lists: Mapping[str, Any] | None = None
    ) -> tuple[RunConfig | None, list[str]]:
        """Return the run's configuration, or None and its problems.

        Cross-field checks run even where some arguments are wrong. Their problems are left out where they concern a
        default that stands in for a wrong value.

        Args:
            refused: keys of arguments that `read` refused.
            lists: the values of `variants` and `grid`. Default: a recipe's.
        """
        draft = self.draft(point, refused=refused, lists=lists)
        for key in [key for key, value in flat(draft.values).items() if value == "???"]:
            group = key.partition(".")[0]
            if not {key, group} & draft.bad and (not draft.reads_tensors or group == "harvest"):
                draft.refuse(key, missing(key, choice=draft.choices.get(group)))
            if key in REQUIRED:
                OmegaConf.update(draft.values, key, "?")  # so that the other checks can run
        try:
            run = build(draft.values)
        except ConfigError as error:
            return None, draft.problems + [p for p in str(error).splitlines() if not _mentions(p, draft.bad)]
        return (None if draft.problems else run), draft.problems

    def draft(
        self, point: Sequence[Override], *, refused: Collection[str] = (), lists: Mapping[str, Any] | None = None
    ) -> DraftPoint:
        """Return a draft: the composed values of the usable arguments, and the problems of the others. See `check`."""
        entries = [self.typed(override) for override in point]
        not_there = {e.key: problem for e in entries if (problem := refused_choice(e, self.choices))}
        problems, bad = check_repeats(entries) + list(not_there.values()), {*refused, *not_there}
        composed, choices = self._compose(self._selections(point))
        values = deepcopy(composed)
        for key, value in (lists or {}).items():
            values[key] = value
        draft = DraftPoint(values=values, choices=choices, problems=problems, bad=bad)
        for override, entry in zip(point, entries, strict=True):
            if entry.sign:
                draft.refuse(entry.key, signed(entry, known=[*flat(values), *self.groups]))
            elif not (entry.is_group or override.is_hydra_override() or entry.key in bad or entry.group in bad):
                self._apply(draft, entry, override)
        draft.leave_out_replaced(typed={entry.key for entry in entries})
        draft.take_law()
        used = [entry for entry in entries if not bad & {entry.key, entry.group}]
        known = {key: value for key, value in flat(draft.values).items() if key not in bad}
        problems += never_read(used, tensors=draft.reads_tensors, choices=choices, values=known)
        return draft

    def typed(self, override: Override) -> Typed:
        """Return an override in plain words, for the checks of overrides.py."""
        signed, _, value = text_of(override).partition("=")
        key = signed.lstrip("+~")
        return Typed(sign=signed.removesuffix(key), key=key, value=value, is_group=key in self.groups)

    def recipe(self, point: Sequence[Override]) -> dict[str, Any]:
        """Return the values of `variants` and `grid` under the choices of a point."""
        composed, _ = self._compose(self._selections(point))
        there = [key for key in LISTS if not OmegaConf.is_missing(composed, key) and composed[key] is not None]
        return dict.fromkeys(LISTS) | {key: OmegaConf.to_container(composed[key]) for key in there}

    def _selections(self, point: Sequence[Override]) -> list[str]:
        """Return the overrides of a point that select a choice."""
        typed = [(override, self.typed(override)) for override in point]
        return [
            entry.text
            for override, entry in typed
            if not entry.sign and (entry.is_group or override.is_hydra_override())
            if refused_choice(entry, self.choices) is None
        ]

    def _compose(self, selections: list[str]) -> tuple[DictConfig, dict[str, str]]:
        """Return the values that these choices compose to, and the choice of each group. The caller changes none."""
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
        return self._composed[key]

    def _apply(self, draft: DraftPoint, entry: Typed, override: Override) -> None:
        """Set one value of a draft, or add the problem to the draft."""
        value, keys = override.value(), flat(draft.values)
        if entry.key not in keys:
            known, choice = [*keys, *self.groups], draft.choices.get(entry.group)
            homes = [] if choice is None else self._homes(entry.key)
            draft.refuse(entry.key, unknown_key(entry, known=known, choice=choice, homes=homes))
            return
        parent, _, field = entry.key.rpartition(".")
        owner = cast(type, OmegaConf.get_type(draft.values, parent or None))
        hint, its_range = get_type_hints(owner)[field], ranges(owner).get(field, Range())
        expected = get_args(hint) or (hint,)
        if its_range.null_with:  # this program makes it null, so the message does not offer null
            expected = tuple(kind for kind in expected if kind is not type(None))
        if str in expected:
            value = typed_value(override)
        try:
            OmegaConf.update(draft.values, entry.key, value)
        except OmegaConfBaseException:
            draft.refuse(entry.key, wrong_type(entry, expected))
            return
        if value == "":
            draft.refuse(entry.key, empty(entry, optional=type(None) in expected))
        if float in expected and (isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))):
            draft.refuse(entry.key, wrong_type(entry, expected))

    def _homes(self, key: str) -> list[str]:
        """Return the choices of the key's group under which the key exists."""
        group = key.partition(".")[0]
        return [choice for choice in self.choices(group) if key in flat(self._compose([f"{group}={choice}"])[0])]


def _mentions(problem: str, keys: set[str]) -> bool:
    """Return whether a message names one of the keys."""
    return any(re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", problem) for key in keys)
