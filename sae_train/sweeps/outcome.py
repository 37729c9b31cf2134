"""The outcome of a run, in one small file that its first rank keeps for a sweep.

The environment variable SAE_TRAIN_OUTCOME names the file; without it nothing is written. Where the file still has the
state 'running' and its job is gone, the run was killed.
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
from sae_train.ranks.launcher_env import job_id, this_process

VARIABLE = "SAE_TRAIN_OUTCOME"
STATES = {0: "finished", 3: "stopped", 75: "preempted"}
"""State by exit status; every other status is 'failed'. Before the end the state is 'running'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The state of one run. `Record` writes it; the sweep's directory reads it."""

    state: str
    """'running', 'finished', 'failed', 'preempted' or 'stopped'."""
    status: int | None
    """Exit status; None while it runs."""
    message: str | None
    """The error message, as the user saw it."""
    run: str | None
    """The run's directory."""
    job: str | None
    """The SLURM job, as squeue names it."""
    restarts: int
    """Number of times that SLURM has put the job back into the queue."""
    time: str
    """Time of writing, UTC."""


def read_outcome(path: Path) -> Outcome | None:
    """Return the outcome in a file; None where no readable file exists."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Outcome(**{name: values[name] for name in Outcome.__dataclass_fields__})
    except (OSError, ValueError, TypeError, KeyError):
        return None


class Record:
    """Writes the outcome file of this run, where SAE_TRAIN_OUTCOME asks for one. `cli/train.py` creates it.

    An error of writing is printed and does not end the run.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        asked = environment.get(VARIABLE)
        self._path = Path(asked) if asked and this_process(environment).rank == 0 else None
        self._job, self._restarts = job_id(environment), int(environment.get("SLURM_RESTART_COUNT") or 0)
        before = read_outcome(self._path) if self._path else None
        self._run = before.run if before else None
        self._has_begun = False

    def begin(self, run: Path) -> None:
        """Write the state 'running' and the run's directory.

        Call it once this process holds the directory. Before that, another job may hold it.
        """
        self._has_begun = True
        self._run = str(run.resolve())
        self._write("running", status=None, message=None)

    def end(self, status: int, message: str | None = None, *, in_use: bool = False) -> None:
        """Write the end of the run.

        Args:
            status: exit status.
            message: error message, if there is one.
            in_use: another process holds the run's directory. The outcome that it writes is then kept.
        """
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
