"""Checks before heavy work: errors gathered and raised together, and numbers that ranks must share evenly."""

from collections.abc import Callable
from typing import TypeVar

from sae_train.errors import ConfigError, UserError

T = TypeVar("T")


class Findings:
    """Errors of independent checks, raised together. `check_stream` collects into one."""

    def __init__(self) -> None:
        self._errors: list[UserError] = []

    def collect(self, check: Callable[[], T]) -> T | None:
        """Return the result of `check`, or keep its UserError and return None."""
        try:
            return check()
        except UserError as error:
            self._errors.append(error)
            return None

    def raise_any(self) -> None:
        """Raise the one error there is, or a ConfigError with a line for each of several. Equal lines are one."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise ConfigError("\n".join(dict.fromkeys(map(str, self._errors)))) from self._errors[0]


def check_batch(batch_tokens: int, n_ranks: int) -> None:
    """Refuse a batch that the ranks cannot share, and name the nearest that they can."""
    if batch_tokens % n_ranks:
        nearest = sorted({max(1, batch_tokens // n_ranks) * n_ranks, (batch_tokens // n_ranks + 1) * n_ranks})
        raise ConfigError(f"batch_tokens={batch_tokens} over {n_ranks} ranks: not divisible. "
                          f"Nearest batch_tokens: {' or '.join(map(str, nearest))}. "
                          f"{_other_ranks(batch_tokens, n_ranks)}")  # fmt: skip


def check_lane_count(lanes: int, n_ranks: int, batch_tokens: int) -> None:
    """Refuse lanes that the ranks cannot share, and name the nearest that they can."""
    if lanes % n_ranks == 0:
        return
    possible = [count for count in range(n_ranks, batch_tokens + 1, n_ranks) if batch_tokens % count == 0]
    nearest = sorted(sorted(possible, key=lambda count: abs(count - lanes))[:2])
    if nearest:
        way_out = f"Nearest harvest.lanes that divide batch_tokens={batch_tokens}: {' or '.join(map(str, nearest))}."
    else:
        fewer = max(1, lanes // n_ranks) * n_ranks
        batches = sorted({max(1, batch_tokens // fewer) * fewer, (batch_tokens // fewer + 1) * fewer})
        way_out = (f"No multiple divides batch_tokens={batch_tokens}. Set harvest.lanes={fewer} and batch_tokens="
                   f"{' or '.join(map(str, batches))}.")  # fmt: skip
    raise ConfigError(
        f"harvest.lanes={lanes} over {n_ranks} ranks: not divisible. {way_out} {_other_ranks(lanes, n_ranks)}"
    )


def _other_ranks(n: int, n_ranks: int) -> str:
    """Return a sentence with the nearest rank counts that divide `n`: only those may change in a run that has begun."""
    below = max(count for count in range(1, n_ranks) if n % count == 0)
    above = next((count for count in range(n_ranks + 1, n + 1) if n % count == 0), None)
    return f"A run that has begun keeps its settings: go on with {below}{f' or {above}' if above else ''} ranks."
