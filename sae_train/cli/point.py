"""One point of a sweep: a draft while it is checked, then the run to make."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_train.cli.overrides import LISTS
from sae_train.cli.zipf_from import zipf_law
from sae_train.config import RunConfig, SaeConfig
from sae_train.config.ranges import ranges
from sae_train.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run to make: the arguments typed for it, their configuration, and its SAEs."""

    overrides: list[str]
    config: RunConfig
    saes: tuple[SaeConfig, ...]


@dataclass(kw_only=True, slots=True)
class DraftPoint:
    """A point that is being checked. `Library.draft` creates it; `Library.check` turns it into a RunConfig."""

    values: DictConfig
    choices: dict[str, str]
    problems: list[str]
    bad: set[str]
    """Keys whose arguments were refused. Their values are stand-ins."""

    @property
    def reads_tensors(self) -> bool:
        return "harvest" not in self.bad and str(self.values.harvest.source) == "tensors"

    def leave_out_replaced(self, *, typed: Collection[str]) -> None:
        """Set to null each dial that was not typed and whose replacement (`Range.null_with`) has a value."""
        values = flat(self.values)
        for key, its_range in ranges(RunConfig).items():
            if its_range.null_with and key not in typed and values.get(its_range.null_with) is not None:
                self.values[key] = None

    def take_law(self) -> None:
        """Set exponent and shift of the budget to the fit of the run that budget.zipf_from names."""
        if "budget.zipf_from" in self.bad or "zipf_from" not in self.values.budget:
            return
        try:
            budget = cast(dict[str, Any], OmegaConf.to_container(self.values.budget, resolve=True))
        except OmegaConfBaseException:  # reported when the values are built
            return
        run, given = budget["zipf_from"], [key for key in ("exponent", "shift") if budget[key] is not None]
        if run is None:
            return
        for key in given:
            self.refuse("budget.zipf_from", f"budget.{key}={budget[key]:g}: budget.zipf_from={run} gives it. Keep one.")
        try:
            law = zipf_law(run)
        except ConfigError as error:
            self.refuse("budget.zipf_from", str(error))
            return
        if not given:
            self.values.budget.exponent, self.values.budget.shift = law

    def refuse(self, key: str, problem: str) -> None:
        """Add a problem, and mark its key as bad."""
        self.problems.append(problem)
        self.bad.add(key)


def flat(config: DictConfig) -> dict[str, Any]:
    """Return every value under its dotted key, interpolations as they are written. The keys of a grid are not keys."""
    found: dict[str, Any] = {}
    for name, value in cast(dict[str, Any], OmegaConf.to_container(config)).items():
        is_group = isinstance(value, dict) and name not in LISTS
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if is_group else {name: value}
    return found


def build(config: DictConfig) -> RunConfig:
    """Return the composed configuration as a RunConfig. Its own checks run here."""
    try:
        run = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(reason(error)) from error
    assert isinstance(run, RunConfig)
    return run


def reason(error: Exception) -> str:
    """Return the message of Hydra or OmegaConf on one line. A user's YAML or an `${...}` causes such errors."""
    causes = [e for e in (error, error.__cause__) if e is not None]
    key = next((str(e.full_key) for e in causes if isinstance(e, OmegaConfBaseException) and e.full_key), None)
    said = " ".join(dict.fromkeys(" ".join(_NOISE.sub("", str(e)).split()) for e in causes))
    return f"{key}: {said}." if key else f"{said}."


_NOISE = re.compile(r"\n\s*full_key:.*|\nTo append to your config.*|\nConfig search path:.*", re.DOTALL)
"""Parts of these messages that do not help, or (`+key`) mislead."""
