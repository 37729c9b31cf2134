"""Leaving a run after a signal: where a rank may leave by itself, and where all ranks must agree first."""

from collections.abc import Callable
from contextlib import suppress

from sae_train.errors import Preempted
from sae_train.harvest.build import Stream
from sae_train.phases import Phases
from sae_train.ranks.interface import Ranks
from sae_train.training import signals


class Stopping:
    """Raises `Preempted` at the places where a run may end. The session makes one and calls it between pieces of work.

    Args:
        agreement: on the signals that any rank received.
        newest_saved: returns the step of the newest checkpoint, None where there is none; for the message.
    """

    def __init__(self, agreement: signals.Agreement, *, newest_saved: Callable[[], int | None], ranks: Ranks) -> None:
        self._agreement, self._newest_saved, self._ranks = agreement, newest_saved, ranks
        self._may_leave_alone = ranks.size == 1

    def before_step(self) -> None:
        """Leave before a step if the ranks have agreed to. Collective; no step waits for the agreement."""
        if self._agreement.poll():
            self._agreement.settle()
            raise self.preempted()
        self.alone()

    def alone(self) -> None:
        """Leave if this process received a signal and need not ask another rank first."""
        if signals.wish() and self._may_leave_alone:
            raise self.preempted()

    def together(self) -> None:
        """Leave if any rank received a signal. Collective; waits for all ranks, so never in a step."""
        if self._agreement.now():
            raise self.preempted()

    def while_filling(self, stream: Stream, phases: Phases) -> None:
        """Let the stream harvest for a step. All ranks meet afterwards where one of them may have had to.

        A rank that received a signal thus need not finish its harvest, which may take minutes.
        """
        if self._ranks.size == 1 or not self._agreement.may_fill:
            stream.fill(phases)
            return
        self._may_leave_alone = True
        with suppress(Preempted):
            stream.fill(phases)
        self._may_leave_alone = False
        self.together()

    def preempted(self) -> Preempted:
        """Return the exception that ends the run; its message names the newest saved step."""
        return self._agreement.preempted(step=self._newest_saved())
