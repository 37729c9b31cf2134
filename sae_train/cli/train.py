"""`sae-train`: from arguments to runs, one after another in this process, or as SLURM jobs.

Hydra composes the configuration and answers `--cfg` and other questions about it. torch and the other heavy libraries
are imported when the first run starts. Where the environment variable SAE_TRAIN_OUTCOME names a file, the first rank
keeps the outcome of the run there.
"""

import os
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sae_train.cli.hydra_flags import ask_hydra, parse_flags
from sae_train.cli.process import BROKEN, INTERRUPTED, PREEMPTED, complain, end_process, run_and_exit, show_all_text
from sae_train.errors import DirectoryInUse, Preempted, StoppedByNumbers, UserError
from sae_train.ranks.launcher_env import this_process
from sae_train.ranks.threads import prepare_threads
from sae_train.sweeps import outcome
from sae_train.training import signals

if TYPE_CHECKING:
    from sae_train.cli.compose import Request
    from sae_train.cli.point import Point


def main() -> None:
    """Run the command of `sys.argv` and exit with its status."""
    run_and_exit(run_command)


def run_point(arguments: list[str], outcome_file: str) -> NoReturn:
    """Run one rank of a job of a sweep. submitit calls it, again after each requeue.

    It never returns to submitit, which would turn every status but 0 into 1.
    """
    show_all_text()
    os.environ[outcome.VARIABLE] = outcome_file
    end_process(run_command(arguments))


def run_command(arguments: list[str]) -> int:
    """Run the command of these arguments; return the exit status."""
    process = this_process()
    # before the imports, which take seconds; it replaces submitit's handlers
    signals.listen(joined=process.size == 1, rank=process.rank)
    record = outcome.Record()
    try:
        request = _request(arguments)
        if request is None:
            return 0
        if process.size == 1:
            signals.leave_early()
        if request.launcher is not None and not any(point.config.dry_run for point in request.points):
            signals.release()  # nothing is trained here, so a signal just ends the process
            return _submit(request, arguments)
    except UserError as error:
        complain(str(error), everywhere=True)
        record.end(error.status, str(error))
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        return _run(request.points, record)
    except KeyboardInterrupt:
        interrupted = "Interrupted. The same command goes on from the last checkpoint."
        complain(interrupted, everywhere=True)
        record.end(INTERRUPTED, interrupted)
        return INTERRUPTED
    except Exception as error:  # recorded for the sweep, then raised
        record.end(1, f"{type(error).__name__}: {error}")
        raise  # a fault of this program keeps its traceback


def _request(arguments: list[str]) -> "Request | None":
    """Return the runs that are asked for, all checked; None where the arguments were a question, now answered."""
    if "--version" in arguments:
        from sae_train import __version__

        sys.stdout.write(f"sae-train {__version__}\n")
        return None
    from sae_train.cli import compose
    from sae_train.cli.library import CONFIG_NAME

    options = parse_flags(arguments)
    folder, name = options.config_dir, options.config_name or CONFIG_NAME
    if not (options.help or options.cfg or options.info or options.hydra_help or options.shell_completion):
        return compose.compose_request(options.overrides, sweep=options.multirun, config_dir=folder, config_name=name)
    if options.help:
        from sae_train.cli.help import usage

        sys.stdout.write(usage(compose.offer(options.overrides, config_dir=folder, config_name=name)))
    else:
        if options.cfg:
            compose.offer(options.overrides, config_dir=folder, config_name=name)
        ask_hydra([a for a in arguments if a not in options.overrides] + options.overrides)
    return None


def _submit(request: "Request", arguments: list[str]) -> int:
    """Send the runs of a sweep to SLURM; return the exit status."""
    from sae_train.sweeps.submit import submit_sweep

    options = parse_flags(arguments)
    flags = [f"--config-dir={Path(options.config_dir).resolve()}"] if options.config_dir else []
    flags += [f"--config-name={options.config_name}"] if options.config_name else []
    assert request.launcher is not None
    return submit_sweep(
        [[*flags, *point.overrides] for point in request.points],
        runs=Path(request.points[0].config.runs).expanduser(),
        launcher=request.launcher,
        task=run_point,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """The end of one run. `_run_one` creates it; `_run` reports it."""

    status: int
    """The run's exit status."""
    problem: str | None = None
    is_finished: bool = False
    """Whether nothing is left to train. A finished run may have stopped SAEs and status 3."""
    in_use: bool = False
    """Whether another process holds the run's directory."""


def _run(points: "list[Point]", record: outcome.Record) -> int:
    """Make the runs one after another; return the gravest exit status.

    In a sweep an error ends one point, and the next point starts. Several ranks stop at the first error, because not
    all of them may have had it.
    """
    prepare_threads()  # before torch reads its settings, and after submitting: SLURM jobs would inherit them
    from sae_train.ranks.distributed import leave

    process = this_process()
    ends: dict[str, End] = {}
    names = _names(points)
    for name, point in zip(names, points, strict=True):
        if name and process.rank == 0:
            sys.stderr.write(f"{name}\n")
        end = ends[name] = _run_one(point, name, record, goes_on=len(points) > 1 and process.size == 1)
        if end.status == PREEMPTED or not (end.is_finished or process.size == 1):
            break
    unfinished = [name for name in names if name not in ends or not ends[name].is_finished]
    reduced = [name for name, end in ends.items() if end.is_finished and end.status]
    if len(points) > 1 and unfinished:
        complain(f"Not finished: {'; '.join(unfinished)}.", everywhere=True)
    if len(points) > 1 and reduced:
        complain(f"Finished, with SAEs that were stopped by the numbers: {'; '.join(reduced)}.", everywhere=True)
    if not unfinished:
        with suppress(UserError):  # all is done, so a rank that is lost now does no harm
            leave()  # not earlier: a process group that was left cannot be joined again
    status = max(end.status for end in ends.values())
    last = next((end for end in reversed(ends.values()) if end.problem), None)
    record.end(status, last.problem if last else None, in_use=last is not None and last.in_use)
    return status


def _run_one(point: "Point", name: str, record: outcome.Record, *, goes_on: bool) -> End:
    """Make one run; report its error, with a traceback where it is a fault of this program.

    Args:
        name: the run's name in a sweep, which begins its messages.
        goes_on: whether a fault of this program ends this run alone. Otherwise it is raised.
    """
    from sae_train.training.run import run

    before = f"{name}: " if name else ""
    try:
        status = run(point.config, saes=point.saes, overrides=point.overrides, entered=record.begin)
    except UserError as error:
        complain(f"{before}{error}", everywhere=isinstance(error, Preempted))
        return End(status=error.status, problem=f"{before}{error}", in_use=isinstance(error, DirectoryInUse))
    except Exception as error:  # a fault of this program ends one run of a sweep, with its traceback, not the sweep
        if not goes_on:
            raise
        traceback.print_exc()
        complain(f"{before}failed with the error above, which is a fault of this program.", everywhere=False)
        return End(status=BROKEN, problem=f"{before}{type(error).__name__}: {error}")
    is_finished = status in (0, StoppedByNumbers.status)
    reason = f"{before}SAEs were stopped by the numbers. summary.json has the reasons."
    return End(status=status, problem=reason if is_finished and status else None, is_finished=is_finished)


def _names(points: "list[Point]") -> list[str]:
    """Return a name for each run of a sweep, such as 'run 2 of 4 (k=32)'. The name of a single run is empty."""
    if len(points) == 1:
        return [""]
    common = set.intersection(*(set(point.overrides) for point in points))
    own = [" ".join(text for text in point.overrides if text not in common) for point in points]
    return [f"run {number} of {len(points)} ({text})" for number, text in enumerate(own, start=1)]
