"""A run while it trains: where it begins, what happens at each event between steps, and what it leaves at the end."""

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import sae_train
from sae_train.errors import CheckpointError, Preempted, StoppedByNumbers
from sae_train.formats.durable import write_text
from sae_train.harvest.build import StreamFacts
from sae_train.phases import Phases
from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.training import checkpoint_files, restore, resume_notices
from sae_train.training.checkpoint import Saver
from sae_train.training.console import TRAINING, figures_text, say, verdict_of, warn
from sae_train.training.export import check_held_out, evaluation_figures, exported, write_export
from sae_train.training.learner import Learner
from sae_train.training.metrics import spread_notice
from sae_train.training.plan import Plan
from sae_train.training.provenance import device_notices, processor
from sae_train.training.run_directory import RunDirectory
from sae_train.training.stopping import Stopping
from sae_train.training.together import on_first, together
from sae_train.training.tracking import Dashboard, MetricsFile
from sae_train.training.trainer import Events, Trainer


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
        self._stream, self._ranks = parts.trainer.stream, parts.trainer.ranks
        self._metrics = MetricsFile(parts.directory.metrics)
        self._dashboard = Dashboard()
        self._seconds_before, self._began = 0.0, time.perf_counter()
        self._has_told_spread = False
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
            StoppedByNumbers: see `Learner.row`.
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
        with self._phases.of(TRAINING, total=self._parts.plan.total_tokens, done=self._trainer.tokens):
            try:
                self._trainer.fit(events)
            except Preempted:
                self._save_this_step()
                raise self._parts.stopping.preempted() from None
            except BaseException as error:
                if isinstance(error, StoppedByNumbers) or self._ranks.size == 1:  # else another rank may be elsewhere
                    self._saver.publish_at_last()
                raise
            self._saver.publish()

    def finish(self) -> None:
        """Export every SAE, and write the summary last: its presence means finished. Collective."""
        seconds, directory, tokens = self._seconds(), self._parts.directory, self._trainer.tokens
        saes = {learner.name: self._export(learner) for learner in self._trainer.learners}
        summary = {
            "run": directory.path.name,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "data": self._stream.data_figures(),
            "saes": saes,
        }
        self._phases.meet()
        self._on_first(lambda: write_text(directory.summary, json.dumps(summary, indent=2) + "\n"))
        for figures in saes.values():
            self._dashboard.summarise(figures)
        if self._ranks.is_first:
            say(verdict_of(summary, path=directory.path, sparsity=self._trainer.learners[0].config.sparsity))

    def _resume(self, found: restore.Checkpoint) -> None:
        """Continue from a checkpoint, and tell the user where and how."""
        notes, plan, directory = found.notes, self._parts.plan, self._parts.directory
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
        own = self._parts.identity, self._parts.plan.sae.n_features
        made_by = notes.get("identity"), notes.get("n_features")
        if made_by != own:
            path = checkpoint_files.path_of(self._parts.directory.checkpoints, notes["step"])
            raise CheckpointError(
                f"{path}: made by another run (identity {made_by[0]}, {made_by[1]} features; this one is {own[0]}, "
                f"{own[1]}). Take it away, or choose another name=."
            )

    def _tell_notices(self) -> None:
        """Open the dashboard, and tell the user about the plan, the data, the dashboard and the device."""
        parts, lines = self._parts, [*self._parts.plan.notices, *self._stream.notices()]
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
        for row in rows:
            if "SLURM_RESTART_COUNT" in os.environ:
                row["perf/slurm_restarts"] = int(os.environ["SLURM_RESTART_COUNT"])
            if "train/fvu" in row:
                self._phases.note(figures_text(row))
            if not self._has_told_spread and (notice := spread_notice(row)):
                self._has_told_spread = True
                if self._ranks.is_first:
                    warn(notice)
            self._on_first(partial(self._metrics.append, row))
            self._dashboard.log(row)

    def _evaluate(self) -> None:
        """Evaluate between two steps. Where a signal ends it, the resumed run begins with this evaluation."""
        try:
            rows = [self._exported(learner)[2] for learner in self._trainer.learners]
        except Preempted:
            self._saver.publish()
            if self._saver.saved_at != self._trainer.n_done:  # a checkpoint of this step has it already
                self._evaluation_due = True
                self._save_this_step()
            raise self._parts.stopping.preempted() from None
        self._evaluation_due = False
        self._log(rows)

    def _exported(self, learner: Learner) -> tuple[SparseAutoencoder, dict[str, Any], dict[str, Any]]:
        """Return an SAE as it would be exported now, its figures, and their row of metrics. Collective."""
        sae, figures = exported(self._trainer, learner, self._phases)
        place = {"sae": learner.name, "step": self._trainer.n_done, "tokens": self._trainer.tokens}
        return sae, figures, place | evaluation_figures(figures)

    def _export(self, learner: Learner) -> dict[str, Any]:
        """Write `saes/NAME/`; return the SAE's entry of the summary. Collective."""
        sae, figures, row = self._exported(learner)
        self._log([row])
        figures |= {
            "filtered_share": self._stream.dropped_share(),
            "dead_fraction_training": learner.dead_fraction(),
        }
        write_export(
            sae,
            self._parts.directory.path / "saes" / learner.name,
            trainer=self._trainer,
            learner=learner,
            facts=self._parts.facts,
            figures=figures,
            phases=self._phases,
        )
        return figures

    def _save_this_step(self) -> None:
        """Write and publish a checkpoint of this very step, before the run leaves."""
        self._saver.publish()
        if self._saver.saved_at != self._trainer.n_done:
            self._trainer.check_finite()
            self._checkpoint(is_last=True)

    def _checkpoint(self, *, is_last: bool = False) -> None:
        """Write a checkpoint, or begin to.

        Args:
            is_last: publish it before this returns.
        """
        trainer, plan = self._trainer, self._parts.plan
        notes = {
            "step": trainer.n_done,
            "tokens": trainer.tokens,
            "metrics_rows": self._metrics.n_rows,
            "seconds": self._seconds(),
            "n_ranks": self._ranks.size,
            "identity": self._parts.identity,
            "n_features": plan.sae.n_features,
            "evaluation_due": self._evaluation_due,
            "sae_train_version": sae_train.__version__,
        } | self._computation()
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
