"""The training loop: a stream, the SAEs that learn from it, and the events between steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sae_train.config import SaeConfig, SourceConfig
from sae_train.harvest.batch import Batch
from sae_train.harvest.build import Stream
from sae_train.ranks.interface import Ranks
from sae_train.training.batch import gathered
from sae_train.training.checkpoint_files import Contents, SaeContents
from sae_train.training.learner import Learner
from sae_train.training.names import sae_name
from sae_train.training.plan import Plan
from sae_train.training.restore import Checkpoint
from sae_train.training.schedule import is_due
from sae_train.training.step_clock import StepClock


@dataclass(slots=True, kw_only=True)
class Events:
    """What the run does between steps. `Session` makes it; `Trainer.fit` decides when each happens."""

    log: Callable[[list[dict[str, Any]]], None]
    """Takes the rows of an interval, one an SAE."""
    evaluate: Callable[[], None]
    checkpoint: Callable[[], None]
    advance: Callable[[int], None]
    """Takes the tokens of a step that has ended."""
    stop: Callable[[], None]
    """Called before every step. Raises where the run is to stop."""
    fill: Callable[[], None]
    """Lets the stream harvest for the step. Raises like `stop`, with the trainer's state as at the step's beginning."""


class Trainer:
    """One stream, and the SAEs that learn from it. The session builds it with `build_trainer`.

    All SAEs make the same steps on the same batches; nothing else connects them. A second SAE is a second `Learner` in
    the list. A rank holds the tokens of its row of the grid of ranks: all that the row's ranks harvested.

    Attributes:
        n_done: steps made so far.
    """

    def __init__(
        self, learners: Sequence[Learner], stream: Stream, *, source: SourceConfig, plan: Plan, ranks: Ranks
    ) -> None:
        self.learners, self.stream, self.source, self.plan, self.ranks = list(learners), stream, source, plan, ranks
        self.n_done = 0
        self._clock = StepClock()

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, over all ranks."""
        return self.n_done * self.plan.batch_tokens

    @property
    def is_done(self) -> bool:
        """Whether the plan's last step is made."""
        return self.n_done == self.plan.steps

    def fit(self, events: Events) -> None:
        """Train to the end of the plan.

        Raises:
            StoppedByNumbers: see `Learner.row`.
        """
        while not self.is_done:
            events.stop()
            self.step(self._harvest(events))
            self._clock.stop()
            events.advance(self.plan.batch_tokens)
            if self._is_due(self.source.log_every):
                events.log(self.rows())
            if self._is_due(self.source.evaluate_every) and not self.is_done:
                events.evaluate()
            if self._is_due(self.plan.checkpoint_every):
                self.check_finite()
                events.checkpoint()

    def step(self, own: Batch) -> None:
        """Let every SAE learn from one batch.

        Args:
            own: the tokens that this rank harvested.
        """
        batch = gathered(own, ranks=self.ranks)
        for learner in self.learners:
            learner.step(batch, step=self.n_done)
        self.n_done += 1

    def rows(self) -> list[dict[str, Any]]:
        """Return a row of figures since the last rows for each SAE, and start the next interval. Collective.

        Raises:
            StoppedByNumbers: see `Learner.row`.
        """
        interval = self.source.log_every
        own = [learner.row(step=self.n_done, interval=interval) for learner in self.learners]
        shared = self.stream.figures() | self._clock.row(harvested_in_background=self.stream.beside_seconds())
        place = {"step": self.n_done, "tokens": self.tokens}
        return [{"sae": learner.name} | place | row | shared for learner, row in zip(self.learners, own, strict=True)]

    def check_finite(self) -> None:
        """Raise StoppedByNumbers on every rank if a loss or gradient of an SAE was not finite. Collective."""
        for learner in self.learners:
            learner.check_finite()

    def contents(self) -> Contents:
        """Return all that a checkpoint needs from this rank. Collective."""
        stream = {f"stream/{name}": value for name, value in self.stream.replicated_state().items()}
        return Contents(
            stream=stream | {"trainer/n_done": torch.tensor(self.n_done)},
            lanes=self.stream.lane_states(),
            saes={learner.name: SaeContents(learner.features, learner.state()) for learner in self.learners},
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, whatever ranks wrote it."""
        for learner in self.learners:
            learner.load_state(checkpoint.sae_state(learner.name, *learner.features))
        state = checkpoint.stream
        stream = {name.removeprefix("stream/"): value for name, value in state.items() if name.startswith("stream/")}
        self.stream.restore(stream, checkpoint.lane_state)
        self.n_done = int(state["trainer/n_done"])

    def _harvest(self, events: Events) -> Batch:
        """Return this rank's tokens of the next step, and time the wait for them."""
        self._clock.start(self.plan.batch_tokens)
        events.fill()
        batch = self.stream.batch(self.n_done)
        self._clock.harvested()
        return batch

    def _is_due(self, every: int) -> bool:
        """Return whether the step that was made last passed a multiple of `every` tokens, or was the run's last."""
        return self.is_done or is_due(every, before=self.tokens - self.plan.batch_tokens, after=self.tokens)


def build_trainer(
    source: SourceConfig, saes: Sequence[SaeConfig], plan: Plan, *, stream: Stream, precision: str, ranks: Ranks
) -> Trainer:
    """Return the trainer of a run, its SAEs as drawn from their seeds.

    Args:
        source: settings of the stream.
        saes: settings of each SAE.
        plan: the run's numbers.
        stream: source of the batches; it need not have begun.
        precision: of matrix products, with 'auto' resolved.
        ranks: arranged in the grid of the plan.
    """
    learners = [
        Learner(
            sae_name(sae, site=plan.sae.site, n_features=plan.sae.n_features),
            sae,
            plan.sae,
            precision=precision,
            ranks=ranks,
        )
        for sae in saes
    ]
    return Trainer(learners, stream, source=source, plan=plan, ranks=ranks)
