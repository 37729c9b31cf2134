"""How a run of a sweep is going, in one small file that its first rank keeps.

The environment variable SAE_TRAIN_OUTCOME names the file; without it nothing is written. A file that says 'running'
when its job is gone belongs to a run that was killed: it could not say so itself.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sae_train.errors import UserError
from sae_train.formats.durable import write_text
from sae_train.ranks.launcher_env import find_place, job_id

VARIABLE = "SAE_TRAIN_OUTCOME"
STATES = {0: "finished", 3: "stopped", 75: "preempted"}
"""What exit statuses mean; every other one is 'failed'. While a run goes on it is 'running'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one run stands."""

    state: str
    """'running', 'finished', 'failed', 'preempted' or 'stopped'."""
    status: int | None
    """Exit status; None while it runs."""
    message: str | None
    """What went wrong, as the user saw it."""
    run: str | None
    """The run's directory."""
    job: str | None
    """The SLURM job, as squeue names it."""
    restarts: int
    """How often SLURM has put the job back into the queue."""
    time: str
    """When this was written."""


def read_outcome(path: Path) -> Outcome | None:
    """Return what a file of outcomes says; None where there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Outcome(**{name: values[name] for name in Outcome.__dataclass_fields__})
    except (OSError, ValueError, TypeError, KeyError):
        return None


class Record:
    """Keeps the file of this process's outcome, where one is asked for.

    Trouble with it is told and nothing more: a run is worth more than what is said about it.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        asked = environment.get(VARIABLE)
        self._path = Path(asked) if asked and find_place(environment).rank == 0 else None
        self._job, self._restarts = job_id(environment), int(environment.get("SLURM_RESTART_COUNT") or 0)
        before = read_outcome(self._path) if self._path else None
        self._run = before.run if before else None
        self._has_begun = False

    def begin(self, run: Path) -> None:
        """Write that the run goes on, and where. Once its directory is held: before, another job may be at it."""
        self._has_begun = True
        self._run = str(run.resolve())
        self._write("running", status=None, message=None)

    def end(self, status: int, message: str | None = None, *, in_use: bool = False) -> None:
        """Write how the run ended; `in_use`: another process has its directory, and keeps the file if it keeps one."""
        there = read_outcome(self._path) if self._path and in_use and not self._has_begun else None
        if there is None or there.state != "running":
            self._write(STATES.get(status, "failed"), status=status, message=message)

    def _write(self, state: str, *, status: int | None, message: str | None) -> None:
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        outcome = Outcome(state=state, status=status, message=message, run=self._run, job=self._job,
                          restarts=self._restarts, time=now)  # fmt: skip
        try:
            write_text(self._path, json.dumps(asdict(outcome)) + "\n")
        except UserError as error:
            sys.stderr.write(f"{VARIABLE}={self._path}: {error}\n")
