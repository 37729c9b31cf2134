"""The training loop: a stream, the SAEs that learn from it, and the events between steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sae_train.config import SourceConfig
from sae_train.errors import StoppedByNumbers
from sae_train.harvest.batch import Batch
from sae_train.harvest.build import Stream
from sae_train.ranks.interface import Ranks, Solo
from sae_train.training.batch import gathered
from sae_train.training.checkpoint_files import Contents, SaeContents
from sae_train.training.learner import Learner
from sae_train.training.plan import Plan
from sae_train.training.restore import Checkpoint
from sae_train.training.schedule import is_due
from sae_train.training.scratch import Scratch
from sae_train.training.step_clock import StepClock
from sae_train.training.throughput import Throughput

T = TypeVar("T")


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

    All SAEs make the same steps on the same tokens; nothing else connects them. A rank holds the tokens of its row of
    the grid of ranks: all that the row's ranks harvested.

    Attributes:
        learners: the SAEs that this rank trains and that have not been stopped.
        stopped: the reason of each SAE that was stopped, by name, over all ranks.
        n_done: steps made so far.
    """

    def __init__(
        self, learners: Sequence[Learner], stream: Stream, *, source: SourceConfig, plan: Plan, ranks: Ranks
    ) -> None:
        self.learners, self.stream, self.source, self.plan, self.ranks = list(learners), stream, source, plan, ranks
        self.stopped: dict[str, str] = {}
        self.n_done = 0
        self.throughput = Throughput(stream.meter, ranks=ranks)
        self._clock = StepClock()

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, over all ranks."""
        return self.n_done * self.plan.batch_tokens

    @property
    def is_done(self) -> bool:
        """Whether the plan's last step is made, or no SAE is left to learn."""
        return self.n_done == self.plan.steps or self.is_empty

    @property
    def is_empty(self) -> bool:
        """Whether every SAE was stopped, on all ranks."""
        return len(self.stopped) == len(self.plan.saes)

    def fit(self, events: Events) -> None:
        """Train to the end of the plan."""
        while not self.is_done:
            events.stop()
            batch = self._harvest(events)
            with self.stream.meter.timed("trained", self.plan.batch_tokens // self.ranks.size):
                self.step(batch)
            self._clock.stop()
            events.advance(self.plan.batch_tokens)
            if self._is_due(self.source.log_every):
                events.log(self.rows())
            if self._is_due(self.source.evaluate_every) and not self.is_done:
                self.stop_nonfinite()
                if not self.is_empty:
                    events.evaluate()
            if self._is_due(self.plan.checkpoint_every):
                self.stop_nonfinite()
                if not self.is_empty:  # the checkpoint before has the SAEs that are stopped now
                    events.checkpoint()

    def step(self, own: dict[str, Batch]) -> None:
        """Let every SAE learn from one batch.

        Args:
            own: the tokens that this rank harvested, by site.
        """
        alone = bool(self.plan.owners)
        batches = {site: gathered(rows, ranks=self.ranks, counts_all=alone) for site, rows in own.items()}
        for learner in self.learners:
            learner.step(batches[learner.plan.site], step=self.n_done)
        self.n_done += 1

    def rows(self) -> list[dict[str, Any]]:
        """Return a row of figures since the last rows for each SAE, and start the next interval. Collective.

        An SAE that has diverged or collapsed is stopped, and has no row.
        """
        interval = self.source.log_every
        own = self._of_each(lambda learner: learner.row(step=self.n_done, interval=interval))
        shared = self.stream.figures() | self._clock.row(harvested_in_background=self.stream.beside_seconds())
        shared |= self.throughput.row()
        place = {"step": self.n_done, "tokens": self.tokens}
        return [{"sae": name} | place | row | shared for name, row in own.items()]

    def stop_nonfinite(self) -> None:
        """Stop each SAE whose loss or gradient was not finite. Collective."""
        self._of_each(Learner.check_finite)

    def of_all_ranks(self, own: dict[str, T]) -> dict[str, T]:
        """Return the values of all SAEs by name, in the order of the plan. Collective.

        Args:
            own: JSON values of the SAEs that this rank trains.
        """
        every = self.ranks.gather_objects(own) if self.plan.owners else [own]
        merged = {name: value for of_rank in every for name, value in of_rank.items()}
        return {name: merged[name] for name in self.plan.saes if name in merged}

    def contents(self) -> Contents:
        """Return all that a checkpoint needs from this rank. Collective."""
        stream = {f"stream/{name}": value for name, value in self.stream.replicated_state().items()}
        return Contents(
            stream=stream | {"trainer/n_done": torch.tensor(self.n_done)},
            lanes=self.stream.lane_states(),
            saes={
                learner.name: SaeContents(learner.features, learner.state(), learner.ranks) for learner in self.learners
            },
        )

    def notes(self) -> dict[str, Any]:
        """Return the entries of checkpoint.json that `restore` reads. Collective."""
        return {
            "step": self.n_done,
            "tokens": self.tokens,
            "stopped": self.stopped,
            "throughput": self.throughput.totals().tolist(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, whatever ranks wrote it."""
        self._leave_out(checkpoint.notes["stopped"])
        self.throughput.load_totals(checkpoint.notes["throughput"])
        for learner in self.learners:
            learner.load_state(checkpoint.sae_state(learner.name, *learner.features))
        state = checkpoint.stream
        stream = {name.removeprefix("stream/"): value for name, value in state.items() if name.startswith("stream/")}
        self.stream.restore(stream, checkpoint.lane_state)
        self.n_done = int(state["trainer/n_done"])

    def _of_each(self, action: Callable[[Learner], T]) -> dict[str, T]:
        """Return the result of `action` for each SAE of all ranks; stop those for which it raises. Collective.

        An SAE that several ranks share raises on all of them.
        """
        results: dict[str, T] = {}
        stopped: dict[str, str] = {}
        for learner in self.learners:
            try:
                results[learner.name] = action(learner)
            except StoppedByNumbers as error:
                stopped[learner.name] = str(error)
        self.stop(stopped)
        return self.of_all_ranks(results)

    def stop(self, reasons: dict[str, str]) -> None:
        """Train and export some SAEs no more. Collective.

        Args:
            reasons: by name of an SAE of this rank. Ranks that share an SAE give the same.
        """
        self._leave_out(self.of_all_ranks(reasons))

    def _leave_out(self, stopped: dict[str, str]) -> None:
        """Drop the learners of SAEs of any rank."""
        self.stopped |= stopped
        self.learners = [learner for learner in self.learners if learner.name not in self.stopped]

    def _harvest(self, events: Events) -> dict[str, Batch]:
        """Return this rank's tokens of the next step by site, and time the wait for them."""
        self._clock.start(self.plan.batch_tokens)
        events.fill()
        batch = self.stream.batch(self.n_done)
        self._clock.harvested()
        return batch

    def _is_due(self, every: int) -> bool:
        """Return whether the step that was made last passed a multiple of `every` tokens, or was the run's last."""
        return self.is_done or is_due(every, before=self.tokens - self.plan.batch_tokens, after=self.tokens)


def build_trainer(source: SourceConfig, plan: Plan, *, stream: Stream, precision: str, ranks: Ranks) -> Trainer:
    """Return the trainer of a run, its SAEs as drawn from their seeds.

    Args:
        source: settings of the stream.
        plan: the run's numbers.
        stream: source of the batches; it need not have begun.
        precision: of matrix products, with 'auto' resolved.
        ranks: arranged in the grid of the plan.
    """
    scratch = Scratch()
    here = [sae for name, sae in plan.saes.items() if plan.owners.get(name, ranks.rank) == ranks.rank]
    own = Solo(ranks.device) if plan.owners else ranks
    learners = [Learner(sae, precision=precision, ranks=own, scratch=scratch) for sae in here]
    return Trainer(learners, stream, source=source, plan=plan, ranks=ranks)
