"""The parts of a run while it trains, what happens at each event, and what is left at the end."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sae_train
from sae_train.config import RunConfig, identity, identity_digest
from sae_train.errors import CheckpointError, Preempted, StoppedByNumbers, UserError
from sae_train.formats.durable import write_text
from sae_train.harvest.build import Stream, StreamFacts, build_stream
from sae_train.phases import Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.training import checkpoint_files, restore, resume_notices, signals
from sae_train.training.checkpoint import Saver
from sae_train.training.console import TRAINING, ProgressBar, figures_text, say, verdict_of, warn
from sae_train.training.export import check_held_out, evaluation_figures, exported, write_export
from sae_train.training.learner import Learner
from sae_train.training.metrics import spread_notice
from sae_train.training.plan import Plan
from sae_train.training.provenance import check_source, device_notices, processor, provenance, resolve_precision
from sae_train.training.run_directory import RunDirectory
from sae_train.training.same_on_ranks import check_same_source
from sae_train.training.tracking import Dashboard, MetricsFile, build_dashboard
from sae_train.training.trainer import Events, build_trainer


class Session:
    """The parts of one run, and what happens at each event."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        facts: StreamFacts,
        *,
        directory: RunDirectory,
        stored: dict[str, Any] | None,
        overrides: list[str],
        entered: Callable[[Path], None],
        agreement: signals.Agreement,
        ranks: Ranks,
        stack: ExitStack,
    ) -> None:
        self._agreement = agreement
        self._phases = Phases(
            show=partial(ProgressBar, is_first=ranks.is_first), alone=self._stop_alone, together=self._stop_now
        )
        self._may_leave_alone = ranks.size == 1
        self._saver = Saver(directory.checkpoints, config.checkpoint, ranks=ranks, phases=self._phases)
        self._on_disk = checkpoint_files.newest_step(directory.checkpoints) if ranks.is_first else None
        self.config, self.directory, self.ranks, self._stack, self.facts = config, directory, ranks, stack, facts
        precision = resolve_precision(config, stored=stored, device=ranks.device)
        self.plan = plan = plan.as_begun(stored["plan"]) if stored else plan
        check_source(facts.record, stored=stored, path=directory.path)
        resolved = dataclasses.replace(config, precision=precision)
        record = {"plan": plan.resolved(), "source": facts.record, "provenance": provenance(overrides)}
        self._on_first(lambda: directory.claim(resolved, identified_as=config, record=record))
        stack.callback(directory.release)
        if not all(ranks.gather_objects(directory.is_seen())):
            self._abandon()
            raise CheckpointError(
                f"{directory.path}: some ranks do not see what the first one wrote there. Put runs=DIR on a file "
                "system that all nodes share."
            )
        if ranks.is_first:
            entered(directory.path)
        try:
            self._phases.meet()
            self.stream: Stream = build_stream(config.source, ranks=ranks, phases=self._phases, facts=facts)
        except UserError:
            self._abandon()
            raise
        stack.callback(self.stream.close)
        agreement.fills_soon = self.stream.fills_soon
        try:
            check_same_source(facts.record, self.stream.fingerprint(), ranks=ranks)
        except UserError:
            self._abandon()
            raise
        self.trainer = build_trainer(config, plan, stream=self.stream, precision=precision, ranks=ranks)
        self._precision = precision
        self.metrics = MetricsFile(directory.metrics)
        self.dashboard = Dashboard()
        self.seconds_before = 0.0
        self._is_spread_said = False

    def go(self) -> None:
        """Begin or resume, train, finish."""
        try:
            self._begin()
        except UserError:
            self._abandon()
            raise
        for line in (*self.plan.notes, *self.stream.notices()):
            self._warn(line)
        self._on_first(self._open_dashboard)
        if self.ranks.is_first:
            asked, precision = self.config.precision, self._precision
            for line in device_notices(self.ranks.device, precision=precision, asked=asked):
                warn(line)
        self._began = time.perf_counter()
        if self._evaluation_due:
            self._evaluate()
        with self._phases.of(TRAINING, total=self.plan.total_tokens, done=self.trainer.tokens):
            self._train()
        self._finish()

    def _train(self) -> None:
        """Make the steps that are left."""
        events = Events(
            log=self._log,
            evaluate=self._evaluate,
            checkpoint=self._checkpoint,
            advance=self._phases.count,
            stop=self._stop,
            fill=self._fill,
        )
        try:
            self.trainer.fit(events)
        except Preempted:
            self._save_this_step()
            raise self._preempted() from None
        except BaseException as error:
            if isinstance(error, StoppedByNumbers) or self.ranks.size == 1:  # else another rank may be elsewhere
                self._saver.publish_at_last()
            raise
        self._saver.publish()

    def _open_dashboard(self) -> None:
        self.dashboard = build_dashboard(self.config, self.directory.path)
        self._stack.callback(self.dashboard.close)
        if self.dashboard.notice:
            warn(self.dashboard.notice)

    def _stop(self) -> None:
        """Leave before a step, once the ranks have agreed that one of them was told to."""
        if self._agreement.poll():
            self._agreement.settle()
            raise self._preempted()
        self._stop_alone()

    def _stop_alone(self) -> None:
        """Leave if this process was told to, where it need not ask another one first."""
        if signals.wish() and self._may_leave_alone:
            raise self._preempted()

    def _fill(self) -> None:
        """Have the stream harvest. All ranks meet after it where one of them may have had to.

        So a rank that was told to stop need not finish its harvest, which may take minutes.
        """
        if self.ranks.size == 1 or not self._agreement.may_fill:
            self.stream.fill(self._phases)
            return
        self._may_leave_alone = True
        with suppress(Preempted):
            self.stream.fill(self._phases)
        self._may_leave_alone = False
        self._stop_now()

    def _stop_now(self) -> None:
        """Leave if a rank was told to, outside of the steps."""
        if self._agreement.now():
            raise self._preempted()

    def _preempted(self) -> Preempted:
        """Return the exception that ends the run; it names the newest saved step."""
        saved = self._saver.saved_at if self._saver.saved_at >= 0 else self._on_disk
        return self._agreement.preempted(step=saved)

    def _begin(self) -> None:
        """Load the newest whole checkpoint, or start the stream."""
        found = restore.newest(self.directory.checkpoints, ranks=self.ranks, warn=warn, phases=self._phases)
        n_rows, self._evaluation_due = 0, False
        if found is None:
            self._on_disk = None
            self.stream.start(self._phases)
            check_held_out(self.stream, ranks=self.ranks)
        else:
            self._check_own(found.notes)
            self._together(lambda: self.trainer.restore(found))
            self._evaluation_due = found.notes.get("evaluation_due", False)
            self.seconds_before, n_rows = found.notes.get("seconds", 0.0), found.notes.get("metrics_rows", 0)
            self._saver.saved_at = self.trainer.n_done
            restarts = os.environ.get("SLURM_RESTART_COUNT")
            again = f", restart {restarts} of the SLURM job" if restarts else ""
            self._say(
                f"resuming at step {self.trainer.n_done:,} of {self.plan.steps:,} in {self.directory.path}{again}"
            )
            for line in resume_notices.notices(found.notes, self._how_it_computes()) if self.ranks.is_first else ():
                warn(line)
        self._on_first(lambda: self.metrics.keep_first(n_rows))

    def _check_own(self, notes: dict[str, Any]) -> None:
        """Refuse a checkpoint that another run's directory was copied from."""
        own = identity_digest(identity(self.config))
        made_by = notes.get("identity"), notes.get("n_features")
        if made_by != (own, self.plan.n_features):
            raise CheckpointError(
                f"{checkpoint_files.path_of(self.directory.checkpoints, notes['step'])}: made by another run (identity "
                f"{made_by[0]}, {made_by[1]} features; this one is {own}, {self.plan.n_features}). "
                "Take it away, or choose another name=."
            )

    def _abandon(self) -> None:
        if self.ranks.is_first:
            self.directory.abandon()

    def _log(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._log_one(row)

    def _log_one(self, row: dict[str, Any]) -> None:
        if "SLURM_RESTART_COUNT" in os.environ:
            row["perf/slurm_restarts"] = int(os.environ["SLURM_RESTART_COUNT"])
        if "train/fvu" in row:
            self._phases.note(figures_text(row))
        if not self._is_spread_said and (notice := spread_notice(row)):
            self._is_spread_said = True
            self._warn(notice)
        self._saver.publish_if_written()
        self._on_first(lambda: self.metrics.append(row))
        self.dashboard.log(row)

    def _evaluate(self) -> None:
        """Evaluate between two steps; a signal ends it, and the run goes on with it where it is resumed."""
        try:
            rows = [self._exported(learner)[2] for learner in self.trainer.learners]
        except Preempted:
            self._saver.publish()
            if self._saver.saved_at != self.trainer.n_done:  # else it says so already
                self._evaluation_due = True
                self._save_this_step()
            raise self._preempted() from None
        self._evaluation_due = False
        self._log(rows)

    def _exported(self, learner: Learner) -> tuple[SparseAutoencoder, dict[str, Any], dict[str, Any]]:
        """Return an SAE as it would be exported now, its figures, and their row of metrics. Collective."""
        sae, figures = exported(self.trainer, learner, self._phases)
        place = {"sae": learner.name, "step": self.trainer.n_done, "tokens": self.trainer.tokens}
        return sae, figures, place | evaluation_figures(figures)

    def _how_it_computes(self) -> dict[str, Any]:
        """Return the facts of this machine on which the bits of a result depend."""
        return {
            "threads": torch.get_num_threads(),
            "processor": processor(self.ranks.device),
            "precision": self._precision,
        }

    def _save_this_step(self) -> None:
        """Leave with a checkpoint of this very step, written and published."""
        self._saver.publish()
        if self._saver.saved_at != self.trainer.n_done:
            self.trainer.check_finite()
            self._checkpoint(is_waited_for=True)

    def _checkpoint(self, *, is_waited_for: bool = False) -> None:
        notes = {
            "step": self.trainer.n_done,
            "tokens": self.trainer.tokens,
            "metrics_rows": self.metrics.n_rows,
            "seconds": self._seconds(),
            "n_ranks": self.ranks.size,
            "identity": identity_digest(identity(self.config)),
            "n_features": self.plan.n_features,
            "evaluation_due": self._evaluation_due,
            "sae_train_version": sae_train.__version__,
        } | self._how_it_computes()
        may_go_on = not is_waited_for and self.trainer.n_done < self.plan.steps
        self._saver.save(self.trainer.contents(), notes, may_go_on=may_go_on)

    def _finish(self) -> None:
        """Export, and write the summary last: its presence means finished."""
        seconds = self._seconds()
        saes: dict[str, dict[str, Any]] = {}
        for learner in self.trainer.learners:
            sae, figures, row = self._exported(learner)
            self._log([row])
            figures |= {
                "filtered_share": self.stream.dropped_share(),
                "dead_fraction_training": learner.dead_fraction(),
            }
            saes[learner.name] = figures
            path = self.directory.path / "saes" / learner.name
            write_export(sae, path, trainer=self.trainer, learner=learner, facts=self.facts, figures=figures,
                         phases=self._phases)  # fmt: skip
        tokens = self.trainer.tokens
        summary = {
            "run": self.directory.path.name,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "data": self.stream.data_figures(),
            "saes": saes,
        }
        self._phases.meet()
        self._on_first(lambda: write_text(self.directory.summary, json.dumps(summary, indent=2) + "\n"))
        for figures in saes.values():
            self.dashboard.summarise(figures)
        self._say(verdict_of(summary, path=self.directory.path, sparsity=self.config.sparsity))

    def _seconds(self) -> float:
        """Return the seconds of training so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self._began

    def _say(self, text: str) -> None:
        if self.ranks.is_first:
            say(text)

    def _warn(self, text: str) -> None:
        if self.ranks.is_first:
            warn(text)

    def _on_first(self, action: Callable[[], None]) -> None:
        """Do `action` on the first rank; raise on every rank what it ran into."""
        self._together(action if self.ranks.is_first else lambda: None)

    def _together(self, action: Callable[[], None]) -> None:
        """Do `action`; raise on every rank what any ran into."""
        problem: UserError | None = None
        try:
            action()
        except UserError as error:
            problem = error
        self.ranks.raise_together(problem)
