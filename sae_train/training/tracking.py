"""Destinations of the rows of metrics: `metrics.jsonl` always, Weights & Biases by way of a process of its own."""

import json
import math
import os
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from sae_train.config import TrackingConfig, WandbConfig
from sae_train.evaluation.density import HISTOGRAM_EDGES
from sae_train.formats.durable import explained, write_text
from sae_train.training import signals
from sae_train.training.console import warn
from sae_train.training.json_process import JsonProcess, NoAnswer

OF_THE_RUN = ("tokens", "perf", "data")
"""Groups of figures that belong to the run, not to one of its SAEs."""
WORKER = Path(__file__).with_name("wandb_worker.py")
ANSWER_SECONDS = 15.0
"""Seconds that wandb's server may take to answer at the start. wandb's own error then says more than a kill."""
FIRST_SECONDS = 18.0
"""Seconds of the first try to start wandb, at most."""
START_SECONDS = 28.0
"""Seconds of both tries, online and offline, at most. Two more are left to kill them within 30 s."""
FINISH_SECONDS = 20.0
"""Seconds that wandb's server may take for the last rows."""
END_SECONDS, HURRIED_SECONDS = 24.0, 5.0
"""Seconds that wandb's process may take to end: after a run, and where a scheduler waits for the run to leave."""
TRUE = ("1", "true", "yes", "y", "on", "t")


class MetricsFile:
    """`metrics.jsonl`: one JSON object a row, appended and flushed whole. The session writes it on the first rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_rows = 0

    def keep_first(self, n_rows: int) -> None:
        """Drop the rows that a killed run wrote after its last checkpoint, so that no row stands twice or in half."""
        with explained(self.path, what="read"):
            text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        whole = [line for line in text.splitlines(keepends=True)[:n_rows] if line.endswith("\n")]
        write_text(self.path, "".join(whole))
        self.n_rows = len(whole)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append rows. A number that JSON cannot hold becomes null."""
        text = "".join(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n" for row in rows)
        with explained(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.n_rows += len(rows)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Dashboard:
    """A dashboard that shows nothing: the twin of `Wandb` for tracking=none and for ranks after the first."""

    notice = ""

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Send the rows of one moment, one an SAE."""

    def summarise(self, saes: dict[str, dict[str, Any]]) -> None:
        """Send the final figures of each SAE and finish. No row comes after them, and the verdict is printed next."""

    def close(self) -> None:
        """Finish, unless `summarise` did."""


class Wandb(Dashboard):
    """Weights & Biases: online where credentials exist, else offline. `build_dashboard` creates it for the session.

    wandb runs in a process of its own, and every wait for it has a deadline: it can neither end nor hang the run. What
    cannot be sent stays in the run's directory, for `wandb sync`.
    """

    def __init__(self, tracking: WandbConfig, settings: dict[str, Any], directory: Path, *, several: bool) -> None:
        self._several = several
        self._folder = directory.absolute() / "wandb"
        self._process: JsonProcess | None = None
        answer, problem = self._start(tracking, settings, directory)
        mode = answer.get("mode")
        self._is_online = mode == "online"
        self._own: str = answer.get("directory", "")
        sync = self._sync_command()
        if mode is None:
            self.notice = f"wandb does not start ({problem}). Rows go to metrics.jsonl alone."
            self.notice += f" Earlier rows can be synced with: {sync}" if sync else ""
        elif mode == "offline":
            why = problem or answer["why"]
            self.notice = f"wandb is offline{f' ({why})' if why else ''}; sync with: {sync}"
        elif mode == "online" and sync:
            self.notice = f"This run was offline before. Once it has ended, sync the earlier rows with: {sync}"

    def log(self, rows: list[dict[str, Any]]) -> None:
        if self._process and rows:
            self._process.send({"row": merged(rows, several=self._several)})

    def summarise(self, saes: dict[str, dict[str, Any]]) -> None:
        if self._process:
            figures = {f"{name}/{key}": value for name, own in saes.items() for key, value in own.items()}
            self._process.send({"summary": figures if self._several else next(iter(saes.values()))})
        self.close()

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.send({"finish": True})
            seconds = HURRIED_SECONDS if _is_told_to_stop() else END_SECONDS
            problem = process.answer(deadline=time.monotonic() + seconds).get("error", "")
        except NoAnswer as error:
            problem = str(error)
        finally:
            process.end()
        if process.n_dropped:
            problem = problem or f"{process.n_dropped} rows were dropped"
        if problem:
            warn(f"wandb may lack rows ({problem}); metrics.jsonl has all. Sync with: {self._sync_command(own=True)}")

    def _start(self, tracking: WandbConfig, settings: dict[str, Any], directory: Path) -> tuple[dict[str, Any], str]:
        """Start wandb as the environment says, else offline. Return its answer, and why the first try failed."""
        begun = time.monotonic()
        request = {"argv": sys.argv, "pid": os.getpid(), "edges": HISTOGRAM_EDGES.tolist()}
        request |= {"finish_seconds": FINISH_SECONDS, "deadline": begun + ANSWER_SECONDS}
        problem = ""
        for changes, seconds in (({}, FIRST_SECONDS), ({"WANDB_MODE": "offline"}, START_SECONDS)):
            try:
                request["options"] = {
                    "project": tracking.project,
                    "entity": tracking.entity,
                    "name": directory.name,
                    "id": _identifier(directory),
                    "resume": "allow",
                    "dir": str(directory.absolute()),
                    "config": settings,
                }
                command = [sys.executable, "-P", str(WORKER)]  # -P: no module of this folder hides one of wandb's
                self._process = JsonProcess(command, environment=_environment() | changes)
                self._process.send(request)
                answer = self._process.answer(deadline=begun + seconds, gives_up=_is_told_to_stop)
            except Exception as error:  # whatever it is, the run goes on without wandb
                answer = {"error": str(error)}
            except BaseException:
                self._give_up()
                raise
            if answer.get("mode") in ("online", "offline"):
                return answer, problem
            self._give_up()
            if "error" not in answer:
                return answer, problem
            problem = problem or answer["error"]
        return {}, problem

    def _give_up(self) -> None:
        process, self._process = self._process, None
        if process:
            process.end()

    def _offline(self) -> list[str]:
        """Return the directories of this run with rows for `wandb sync`, oldest first."""
        found = [path.parent for path in self._folder.glob("offline-run-*/*.wandb")]
        paths = [str(path) for path in sorted(found) if not list(path.glob("*.wandb.synced"))]
        return paths if self._is_online or self._own in ("", *paths) else [*paths, self._own]

    def _sync_command(self, *, own: bool = False) -> str:
        """Return the command that syncs every waiting directory, or "". `own` adds the directory of an online run."""
        paths, flags = self._offline(), ""
        if own and self._is_online:
            paths, flags = [*paths, self._own], " --include-online"
        return f"wandb sync{flags} {shlex.join(paths)}" if paths else ""


def _is_told_to_stop() -> bool:
    return signals.wish() != signals.NONE


def _environment() -> dict[str, str]:
    """Return the environment of wandb's process: the run's program as the program, and no other program's service."""
    shared = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    return {"WANDB_PROGRAM": sys.argv[0], **shared}


def _identifier(directory: Path) -> str:
    """Return the run's wandb id, kept in its directory so that a resumed run continues the same curves."""
    path = directory / "wandb_id"
    if not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8").strip()


def _is_switched_off() -> bool:
    """Return whether the environment turns wandb off. wandb itself no longer reads WANDB_DISABLED."""
    asked = os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_DISABLED", "")
    return asked[0].strip().lower() == "disabled" or asked[1].strip().lower() in TRUE


def merged(rows: list[dict[str, Any]], *, several: bool) -> dict[str, Any]:
    """Return the rows of one moment as one row of wandb.

    Args:
        several: whether the run has several SAEs. The figures of an SAE are then `<sae>/<figure>`.
    """
    row: dict[str, Any] = {}
    for own in rows:
        for key, value in own.items():
            if key not in ("sae", "step"):
                of_the_run = not several or key.partition("/")[0] in OF_THE_RUN
                row[key if of_the_run else f"{own['sae']}/{key}"] = value
    return row


def build_dashboard(tracking: TrackingConfig, settings: dict[str, Any], directory: Path, *, several: bool) -> Dashboard:
    """Return the dashboard that `tracking` names. Only the first rank calls it.

    Args:
        settings: of the run, which the dashboard shows.
        directory: of the run.
        several: whether the run has several SAEs.
    """
    if isinstance(tracking, WandbConfig) and not _is_switched_off():
        return Wandb(tracking, settings, directory, several=several)
    return Dashboard()
