"""What is wrong with a run's settings, all of it at once."""

from collections.abc import Callable
from typing import TypeVar

from sae_train.errors import ConfigError, UserError

T = TypeVar("T")


class Findings:
    """Errors of independent checks, raised together."""

    def __init__(self) -> None:
        self._errors: list[UserError] = []

    def collect(self, check: Callable[[], T]) -> T | None:
        """Return what `check` returns; keep its error, if it raises one for the user, and return None."""
        try:
            return check()
        except UserError as error:
            self._errors.append(error)
            return None

    def raise_any(self) -> None:
        """Raise the one error there is, or a ConfigError with a line for each of several."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise ConfigError("\n".join(map(str, self._errors))) from self._errors[0]
