"""Long parts of a run: loops report their progress here, and leave here when the run was told to stop.

A run's session makes one `Phases` and hands it to harvest, calibration, evaluation, checkpoints and export. Code that
nobody hands one uses `SILENT`, which shows nothing and never stops. Light: imports no torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Bar(Protocol):
    """What shows the progress of one phase."""

    def advance(self, n: int) -> None:
        """Count `n` more units as done."""

    def note(self, text: str) -> None:
        """Put `text` behind the bar."""

    def close(self) -> None:
        """End the bar."""


class NoBar:
    """A bar that shows nothing."""

    def advance(self, n: int) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def close(self) -> None:
        return None


class Show(Protocol):
    """Opens the bar of a phase."""

    def __call__(self, name: str, *, total: int, unit: str, done: int, is_nested: bool) -> Bar: ...


def _no_bar(name: str, *, total: int, unit: str, done: int, is_nested: bool) -> Bar:
    return NoBar()


def _go_on() -> None:
    return None


class Phases:
    """The phase that is under way. Phases nest: an evaluation may come between two steps of the training.

    `count` only reports progress. `advance` is for one rank's own work and may be called any number of times. `meet` is
    collective: all ranks call it at the same places. The last two may raise what ends the run.
    """

    def __init__(
        self, *, show: Show = _no_bar, alone: Callable[[], None] = _go_on, together: Callable[[], None] = _go_on
    ) -> None:
        """Args:
        show: opens a bar.
        alone: raises where this process was told to stop and may leave without asking another rank.
        together: asks all ranks and raises on every one of them where any was told to stop. Collective.
        """
        self._show, self._alone, self._together = show, alone, together
        self._bars: list[Bar] = []

    @contextmanager
    def of(self, name: str, *, total: int, unit: str = "tok", done: int = 0) -> Iterator[None]:
        """Show a phase inside the block.

        Args:
            name: what the user reads in front of the bar.
            total: units of work, from which the bar derives the time left.
            unit: of `total`: 'tok' for tokens, 'B' for bytes.
            done: units that an earlier process did.
        """
        bar = self._show(name, total=total, unit=unit, done=done, is_nested=bool(self._bars))
        self._bars.append(bar)
        try:
            yield
        finally:
            self._bars.pop().close()

    def count(self, n: int) -> None:
        """Count `n` units as done."""
        if self._bars:
            self._bars[-1].advance(n)

    def advance(self, n: int = 0) -> None:
        """Count `n` units as done; leave where this process was told to stop and may do so by itself."""
        self.count(n)
        self._alone()

    def meet(self, n: int = 0) -> None:
        """Count `n` units as done; leave where any rank was told to stop. Collective."""
        self.count(n)
        self._together()

    def note(self, text: str) -> None:
        """Put `text` behind the bar of the phase."""
        if self._bars:
            self._bars[-1].note(text)


SILENT = Phases()
"""Shows nothing and never stops."""
