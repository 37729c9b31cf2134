"""A run while it trains: where it begins, what happens at each event between steps, and what it leaves at the end."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import sae_train
from sae_train.errors import CheckpointError, Preempted
from sae_train.harvest.build import StreamFacts
from sae_train.phases import Phases
from sae_train.training import checkpoint_files, restore, resume_notices
from sae_train.training.checkpoint import Saver
from sae_train.training.console import TRAINING, progress_text, say, warn
from sae_train.training.export import check_held_out, evaluation_figures, export_all
from sae_train.training.metrics import spread_notice
from sae_train.training.plan import Plan
from sae_train.training.provenance import device_notices, processor
from sae_train.training.results import write_results, write_saes
from sae_train.training.run_directory import RunDirectory
from sae_train.training.stopping import Stopping
from sae_train.training.together import on_first, together
from sae_train.training.tracking import Dashboard, MetricsFile
from sae_train.training.trainer import Events, Trainer

NOT_FINITE = (
    "its reconstructions of held-out activations are not finite: training has diverged, or the activations are too "
    "large for float32. Lower optimizer.lr, or rescale the activations."
)
"""Reason of an SAE that could not be evaluated at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a run, all of them open. `run.py` makes it for a `Session`."""

    plan: Plan
    facts: StreamFacts
    directory: RunDirectory
    """Claimed by this run."""
    identity: str
    """Digits of the run's identity."""
    typed_precision: str
    precision: str
    """`typed_precision` with 'auto' resolved."""
    trainer: Trainer
    saver: Saver
    stopping: Stopping
    phases: Phases
    open_dashboard: Callable[[], Dashboard]
    """Called on the first rank, once the run has begun."""
    stack: ExitStack
    """Closes what the session opens."""


class Session:
    """One run in its directory. `run.py` makes it and calls `begin`, `train` and `finish`, in this order."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._trainer, self._phases, self._saver = parts, parts.trainer, parts.phases, parts.saver
        self._stream, self._ranks, self._plan = parts.trainer.stream, parts.trainer.ranks, parts.plan
        self._metrics = MetricsFile(parts.directory.metrics)
        self._dashboard = Dashboard()
        self._seconds_before, self._began = 0.0, time.perf_counter()
        self._has_told_spread = False
        self._told_stopped: set[str] = set()
        self._evaluation_due = False

    def begin(self) -> None:
        """Load the newest whole checkpoint, or start the stream. Collective.

        Raises:
            UserError: the checkpoint is another run's, or the data cannot be used.
        """
        checkpoints = self._parts.directory.checkpoints
        found = restore.newest(checkpoints, ranks=self._ranks, warn=warn, phases=self._phases)
        if found is None:
            self._saver.found_at = None
            self._stream.start(self._phases)
            check_held_out(self._stream, ranks=self._ranks)
        else:
            self._resume(found)
        n_rows = 0 if found is None else found.notes.get("metrics_rows", 0)
        self._on_first(lambda: self._metrics.keep_first(n_rows))

    def train(self) -> None:
        """Make the steps that are left. Collective.

        Raises:
            Preempted: a rank received a signal; the run is saved.
        """
        self._tell_notices()
        self._began = time.perf_counter()
        if self._evaluation_due:
            self._evaluate()
        events = Events(
            log=self._log,
            evaluate=self._evaluate,
            checkpoint=self._checkpoint,
            advance=self._phases.count,
            stop=self._parts.stopping.before_step,
            fill=partial(self._parts.stopping.while_filling, self._stream, self._phases),
        )
        with self._phases.of(TRAINING, total=self._plan.total_tokens, done=self._trainer.tokens):
            try:
                self._trainer.fit(events)
            except Preempted:
                self._save_this_step()
                raise self._parts.stopping.preempted() from None
            except BaseException:
                if self._ranks.size == 1:  # else another rank may be elsewhere
                    self._saver.publish_at_last()
                raise
            self._saver.publish()

    def finish(self) -> dict[str, Any]:
        """Export every SAE, and write the summary last: its presence means finished. Collective.

        Returns:
            The summary.
        """
        seconds, directory, tokens = self._seconds(), self._parts.directory, self._trainer.tokens
        began = time.perf_counter()
        self._tell_stopped()
        figures = {} if self._trainer.is_empty else self._export()
        summary: dict[str, Any] = {
            "run": directory.path.name,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "throughput": self._trainer.throughput.summary(),
            "evaluation_seconds": time.perf_counter() - began,
            "data": self._stream.data_figures(),
            "saes": {name: figures.get(name) or {"stopped": self._trainer.stopped[name]} for name in self._plan.saes},
        }
        self._phases.meet()
        self._on_first(lambda: write_results(summary, self._plan, self._parts.facts, directory))
        self._dashboard.summarise(summary["saes"])
        return summary

    def _resume(self, found: restore.Checkpoint) -> None:
        """Continue from a checkpoint, and tell the user where and how."""
        notes, plan, directory = found.notes, self._plan, self._parts.directory
        self._check_own(notes)
        together(lambda: self._trainer.restore(found), ranks=self._ranks)
        self._evaluation_due = notes.get("evaluation_due", False)
        self._seconds_before = notes.get("seconds", 0.0)
        self._saver.saved_at = step = self._trainer.n_done
        if self._ranks.is_first:
            restarts = os.environ.get("SLURM_RESTART_COUNT")
            again = f", restart {restarts} of the SLURM job" if restarts else ""
            say(f"resuming at step {step:,} of {plan.steps:,} in {directory.path}{again}")
            for line in resume_notices.notices(notes, self._computation()):
                warn(line)

    def _check_own(self, notes: dict[str, Any]) -> None:
        """Refuse a checkpoint that was copied from another run's directory."""
        made_by = notes.get("identity"), notes.get("widths")
        if made_by != (self._parts.identity, self._widths()):
            path = checkpoint_files.path_of(self._parts.directory.checkpoints, notes["step"])
            raise CheckpointError(
                f"{path}: made by another run (identity {made_by[0]} with widths {made_by[1]}; this one is "
                f"{self._parts.identity} with {self._widths()}). Take it away, or choose another name=."
            )

    def _widths(self) -> dict[str, int]:
        """Return the width of each SAE."""
        return {name: sae.n_features for name, sae in self._plan.saes.items()}

    def _tell_notices(self) -> None:
        """Open the dashboard, and tell the user about the plan, the data, the dashboard and the device."""
        parts, lines = self._parts, [*self._plan.notices, *self._stream.notices()]
        self._on_first(self._open_dashboard)
        if self._ranks.is_first:
            lines += [self._dashboard.notice] if self._dashboard.notice else []
            lines += device_notices(self._ranks.device, precision=parts.precision, asked=parts.typed_precision)
            for line in lines:
                warn(line)

    def _open_dashboard(self) -> None:
        self._dashboard = self._parts.open_dashboard()
        self._parts.stack.callback(self._dashboard.close)

    def _log(self, rows: list[dict[str, Any]]) -> None:
        """Write rows of metrics, one an SAE, and publish a checkpoint that has been written meanwhile."""
        self._saver.publish_if_written()
        self._tell_stopped()
        for row in rows:
            if "SLURM_RESTART_COUNT" in os.environ:
                row["perf/slurm_restarts"] = int(os.environ["SLURM_RESTART_COUNT"])
            if not self._has_told_spread and (notice := spread_notice(row)):
                self._has_told_spread = True
                if self._ranks.is_first:
                    warn(notice)
        if any("train/fvu" in row for row in rows):
            self._phases.note(progress_text(rows))
        self._on_first(lambda: self._metrics.append(rows))
        self._dashboard.log(rows)

    def _tell_stopped(self) -> None:
        """Tell the user about each SAE that was stopped since the last call, where others go on."""
        for name, reason in self._trainer.stopped.items():
            if name not in self._told_stopped and self._ranks.is_first:
                warn(f"{name} is stopped and left out: {reason}")
            self._told_stopped.add(name)

    def _evaluate(self) -> None:
        """Evaluate between two steps. Where a signal ends it, the resumed run begins with this evaluation."""
        try:
            figures = {learner.name: figures for learner, _, figures in export_all(self._trainer, self._phases)}
        except Preempted:
            self._saver.publish()
            if self._saver.saved_at != self._trainer.n_done:  # a checkpoint of this step has it already
                self._evaluation_due = True
                self._save_this_step()
            raise self._parts.stopping.preempted() from None
        self._evaluation_due = False
        self._log(self._evaluation_rows(figures))

    def _evaluation_rows(self, figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a row of metrics for each SAE of all ranks. Collective.

        Args:
            figures: of the SAEs of this rank, by name.
        """
        place = {"step": self._trainer.n_done, "tokens": self._trainer.tokens}
        every = self._trainer.of_all_ranks(figures)
        return [{"sae": name} | place | evaluation_figures(own) for name, own in every.items()]

    def _export(self) -> dict[str, dict[str, Any]]:
        """Write `saes/NAME/` of every SAE; return the entries of the summary by name, of all ranks. Collective."""
        made = export_all(self._trainer, self._phases)
        whole = {learner.name for learner, _, _ in made}
        self._trainer.stop({each.name: NOT_FINITE for each in self._trainer.learners if each.name not in whole})
        self._log(self._evaluation_rows({learner.name: figures for learner, _, figures in made}))
        own = write_saes(made, self._trainer, self._parts.directory, self._parts.facts, phases=self._phases)
        return self._trainer.of_all_ranks(own)

    def _save_this_step(self) -> None:
        """Write and publish a checkpoint of this very step, before the run leaves."""
        self._saver.publish()
        if self._saver.saved_at != self._trainer.n_done:
            self._trainer.stop_nonfinite()
            if not self._trainer.is_empty:  # the checkpoint before has the SAEs that are stopped now
                self._checkpoint(is_last=True)

    def _checkpoint(self, *, is_last: bool = False) -> None:
        """Write a checkpoint, or begin to.

        Args:
            is_last: publish it before this returns.
        """
        trainer, plan = self._trainer, self._plan
        notes = (
            trainer.notes()
            | {
                "metrics_rows": self._metrics.n_rows,
                "seconds": self._seconds(),
                "n_ranks": self._ranks.size,
                "identity": self._parts.identity,
                "widths": self._widths(),
                "evaluation_due": self._evaluation_due,
                "sae_train_version": sae_train.__version__,
            }
            | self._computation()
        )
        may_go_on = not is_last and trainer.n_done < plan.steps
        self._saver.save(trainer.contents(), notes, may_go_on=may_go_on, phases=self._phases)

    def _computation(self) -> dict[str, Any]:
        """Return the facts of this machine on which the bits of a result depend."""
        return {
            "threads": torch.get_num_threads(),
            "processor": processor(self._ranks.device),
            "precision": self._parts.precision,
        }

    def _seconds(self) -> float:
        """Return the seconds of training so far, with those before a resume."""
        return self._seconds_before + time.perf_counter() - self._began

    def _on_first(self, action: Callable[[], None]) -> None:
        on_first(action, ranks=self._ranks)
