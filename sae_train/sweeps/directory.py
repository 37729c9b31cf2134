"""A sweep's directory: its points, the state of each, and the jobs that were submitted for it.

`runs/sweep-<six hex digits of the points>/` holds points.txt (a line of arguments a point), outcomes/0000.json and so
on (see outcome.py), jobs.jsonl (a row for each submission) and logs/. Reading changes nothing.
"""

import fcntl
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sae_train.errors import ConfigError
from sae_train.formats.durable import explained, write_text
from sae_train.sweeps.outcome import Outcome, read_outcome
from sae_train.sweeps.queue import queued
from sae_train.training.path_length import check_length
from sae_train.training.run_directory import RunDirectory

LONGEST_BELOW = 80
"""Bytes that the longest path below a sweep's directory may need, such as logs/1234567_12_0_log.out."""
TAIL = 65_536
"""Bytes at the end of metrics.jsonl that are searched for its last row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PointState:
    """The state of one point of a sweep. `SweepDirectory.states` creates it; submission and sweep_status print it.

    Attributes:
        index: number of the point, from 0.
        text: the arguments that not every point has.
        state: 'done', 'running', 'waiting', 'preempted', 'failed' or 'stopped'.
        is_open: whether a job of the point waits or runs, as far as SLURM can be asked.
        job: the SLURM job of the point.
        status: exit status of the run, once it has ended.
        tokens: tokens that the run has trained on.
        note: one line for the user.
    """

    index: int
    text: str
    state: str
    is_open: bool
    job: str | None = None
    status: int | None = None
    tokens: int | None = None
    note: str = ""

    @property
    def is_done(self) -> bool:
        return self.state == "done"


class SweepDirectory:
    """The files of one sweep, below `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = (path / "points.txt").read_text(encoding="utf-8", errors="surrogateescape")
            self.points = [line for line in text.split("\n") if line]
        except OSError as error:
            raise ConfigError(f"{path}: not a sweep's directory: no points.txt that can be read.") from error

    @classmethod
    def made(cls, runs: Path, points: Sequence[Sequence[str]]) -> "SweepDirectory":
        """Return the directory of these points below `runs`; create it where it does not exist."""
        lines = [shlex.join(point) for point in points]
        digest = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:6]
        path = runs / f"sweep-{digest}"
        check_length(path, below=LONGEST_BELOW)
        with explained(path):
            for folder in (path / "outcomes", path / "logs"):
                folder.mkdir(parents=True, exist_ok=True)
        if not (path / "points.txt").exists():
            write_text(path / "points.txt", "".join(f"{line}\n" for line in lines))
        return cls(path)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def outcome_path(self, index: int) -> Path:
        return self.path / "outcomes" / f"{index:04d}.json"

    def arguments(self, index: int) -> list[str]:
        """Return the arguments of `sae-train` for a point.

        Raises:
            ConfigError: the line's quotes do not match.
        """
        try:
            return shlex.split(self.points[index])
        except ValueError as error:
            raise ConfigError(
                f"{self.path / 'points.txt'}, line {index + 1}: {error}. Quote it as in a shell."
            ) from error

    def names(self) -> list[str]:
        """Return for each point the arguments that not every point has."""
        split = [self.arguments(index) for index in range(len(self.points))]
        common = set.intersection(*map(set, split)) if len(split) > 1 else set()
        return [" ".join(word for word in words if word not in common) for words in split]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold a lock, so that one submission at a time reads states and submits."""
        with explained(self.path), (self.path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def note_jobs(self, jobs: dict[int, str]) -> None:
        """Append the job that was submitted for each point."""
        rows = "".join(json.dumps({"point": index, "job": job}) + "\n" for index, job in jobs.items())
        with explained(self.path), (self.path / "jobs.jsonl").open("a", encoding="utf-8") as file:
            file.write(rows)

    def jobs(self) -> dict[int, str]:
        """Return the last job that was submitted for each point."""
        found: dict[int, str] = {}
        try:
            lines = (self.path / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return found
        for line in lines:
            try:
                row = json.loads(line)
                found[int(row["point"])] = str(row["job"])
            except (ValueError, TypeError, KeyError):
                continue
        return found

    def states(self) -> tuple[list[PointState], bool]:
        """Return the state of every point, and whether SLURM could be asked about jobs."""
        outcomes = [read_outcome(self.outcome_path(index)) for index in range(len(self.points))]
        submitted = self.jobs()
        there = queued([*submitted.values(), *(o.job for o in outcomes if o is not None and o.job)])
        states = [
            _state(index, text, outcome, submitted=submitted.get(index), there=there)
            for index, (text, outcome) in enumerate(zip(self.names(), outcomes, strict=True))
        ]
        return states, there is not None


def _state(
    index: int, text: str, outcome: Outcome | None, *, submitted: str | None, there: dict[str, str] | None
) -> PointState:
    """Return the state of a point.

    Args:
        outcome: content of its outcome file, if there is one.
        submitted: the last job that was submitted for it.
        there: jobs that have not ended, with SLURM's state; None where SLURM could not be asked.
    """

    def stands(state: str, note: str = "", *, job: str | None, is_open: bool) -> PointState:
        status = outcome.status if outcome else None
        tokens = _tokens(outcome.run) if outcome else None
        return PointState(index=index, text=text, state=state, is_open=is_open, job=job, status=status, tokens=tokens,
                          note=note)  # fmt: skip

    def is_there(job: str | None) -> bool:
        return job is not None and there is not None and job in there

    if outcome is None or (is_there(submitted) and submitted != outcome.job):
        if submitted is None:
            return stands("waiting", "not submitted", job=None, is_open=False)
        if there is None or is_there(submitted):
            begun = there is not None and there[submitted] != "PENDING"
            return stands("running" if begun else "waiting", job=submitted, is_open=True)
        return stands("failed", f"job {submitted} ended before the run began; see logs/", job=submitted, is_open=False)
    job = outcome.job
    last_line = (outcome.message or "").strip().rpartition("\n")[2]
    match outcome.state:
        case "finished":
            if outcome.run is None or RunDirectory(Path(outcome.run)).result() is None:
                return stands("failed", f"finished, and {outcome.run} is not whole any more", job=job, is_open=False)
            return stands("done", job=job, is_open=is_there(job))
        case "running":
            if job is not None and there is not None:
                if not is_there(job):
                    note = f"job {job} is gone and did not say why; the same command goes on"
                    return stands("failed", note, job=job, is_open=False)
                if there[job] == "PENDING":
                    return stands("waiting", "back in the queue", job=job, is_open=True)
            return stands("running", job=job, is_open=True)
        case "preempted":
            gone = job is None or (there is not None and not is_there(job))
            return stands("preempted", "not in the queue; the same command goes on" if gone else last_line, job=job,
                          is_open=not gone)  # fmt: skip
        case "stopped":
            return stands("stopped", last_line, job=job, is_open=is_there(job))
    return stands("failed", last_line, job=job, is_open=is_there(job))


def _tokens(run: str | None) -> int | None:
    """Return the tokens in the last whole row of a run's metrics."""
    if run is None:
        return None
    try:
        with (Path(run) / "metrics.jsonl").open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["tokens"])
        except (ValueError, TypeError, KeyError):
            continue
    return None
