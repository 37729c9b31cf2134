"""Ranges of settings: each field carries its own, one function checks all, and `sae-train --help` prints them.

A field is declared as `k: Annotated[float | None, Range(above=0)]`. A rule between two fields is no range: it is code,
in `conflicts` of the class that holds both.
"""

from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The values that a field may have. Fields of `config/` create it; `Settings.problems` and `--help` read it."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    """The allowed words, for a field of text."""
    noun: str = "value"
    """What the field is, for the message about a word that is not allowed: `no such precision`."""
    unit: str = ""
    """The unit, for the message: `a share of the tokens`."""
    advice: str = ""
    """A sentence that ends the message, such as `0 is off.`"""
    null_with: str = ""
    """Dotted key whose value takes the place of this field's. The field is null where that key has a value."""

    def holds(self, value: Any) -> bool:
        """Return whether a value lies in the range. NaN lies in no range."""
        if self.choices:
            return value in self.choices
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    @property
    def words(self) -> str:
        """The range in words: '0 to 1', 'above 0 and at most 1', 'eager, sdpa or flash_attention_2'."""
        if self.choices:
            return " or ".join(filter(None, [", ".join(self.choices[:-1]), self.choices[-1]]))
        if self.at_least is not None and self.at_most is not None:
            return f"{_number(self.at_least)} to {_number(self.at_most)}"
        ends = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {_number(end)}" for word, end in ends.items() if end is not None)

    def problem(self, key: str, value: Any) -> str:
        """Return the message about a value outside of the range; `key` is the field's dotted key."""
        given, advice = f"{key}={_number(value)}", f" {self.advice}" if self.advice else ""
        if self.choices:
            return f"{given}: no such {self.noun}. Choose {self.words}.{advice}"
        if self.unit:
            return f"{given}: {self.unit}, {self.words}.{advice}"
        shorter = {"at least 0": "must not be negative", "above 0": "must be positive"}
        return f"{given}: {shorter.get(self.words, f'must be {self.words}')}.{advice}"


class Settings:
    """Base of every group of settings."""

    __slots__ = ()

    def conflicts(self) -> list[str]:
        """Return a problem for each rule between fields of this group that their values break."""
        return []

    def problems(self, prefix: str = "") -> list[str]:
        """Return a problem for each value outside of its range and for each conflict.

        Args:
            prefix: stands before each field's name in a message, such as 'optimizer.'.
        """
        found = ranges(type(self)).items()
        values = [(name, each, getattr(self, name)) for name, each in found]
        outside = [
            each.problem(f"{prefix}{name}", value)
            for name, each, value in values
            if value is not None and not each.holds(value)
        ]
        return outside + self.conflicts()


def ranges(settings: type) -> dict[str, Range]:
    """Return the range of each field that has one."""
    hints = get_type_hints(settings, include_extras=True)
    found = {field.name: [note for note in get_args(hints[field.name]) if isinstance(note, Range)]
             for field in fields(settings)}  # fmt: skip
    return {name: notes[0] for name, notes in found.items() if notes}


def _number(value: Any) -> str:
    """Return a value as it is typed: 32.0 as '32', 10**15 as '1e15'."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**9 and value % 10**9 == 0:
        return f"{value:.0e}".replace("e+", "e")
    return str(value).removesuffix(".0")


SHARE = Range(at_least=0, at_most=1, unit="a share of the tokens")
LARGEST_NUMBER = 10**15
"""Largest count of tokens: far above any run, far below the limit of 64 bits."""
COUNT = Range(at_least=1, at_most=LARGEST_NUMBER)
