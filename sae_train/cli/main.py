"""The command line: arguments to runs, errors to messages, outcomes to exit statuses.

0 finished, 1 our fault (traceback) or a lost rank, 2 the user's (message), 3 stopped by the numbers, 75 preempted and
saved, 130 interrupted. Hydra composes, and answers `--cfg` and the other questions about the configuration; the runs
are made here, one after another, or sent to SLURM. torch and the other heavy libraries are imported when the first run
starts. Where SAE_TRAIN_OUTCOME names a file, it says how the run stands.
"""

import argparse
import io
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sae_train.errors import DirectoryInUse, Preempted, UserError, raise_all
from sae_train.ranks.launcher_env import find_place
from sae_train.ranks.threads import prepare_threads
from sae_train.sweeps import outcome
from sae_train.training import signals

if TYPE_CHECKING:
    from sae_train.cli.compose import Point, Request

BROKEN = 1
PREEMPTED = 75
INTERRUPTED = 130
FIRST_RANK_SPEAKS = 3.0
"""Seconds in which the first rank reports an error that all ranks have, before the launcher ends them all."""


def main() -> None:
    """Do what `sys.argv` says and exit with a status."""
    _show_all_text()
    status = run_command(sys.argv[1:])
    if find_place().size > 1:
        # threads of a group of processes that was left may still end while Python does, and abort it (seen: four runs
        # in ten that had finished well); nothing is left to do but to hand over the status
        _leave(status)
    if status == INTERRUPTED:
        # where SIGINT met code that was given as text (as dataclasses give it, at imports) `python -m` ends itself by
        # SIGINT at the end, though it was caught; the next code that is given as text takes that back
        exec("")
    sys.exit(status)


def run_point(arguments: list[str], outcome_file: str) -> NoReturn:
    """Be one rank of a job of a sweep: what submitit calls, again after each requeue.

    submitit's own end is left out: it would make every status but 0 into 1, and its result is read by nobody.
    """
    _show_all_text()
    os.environ[outcome.VARIABLE] = outcome_file
    _leave(run_command(arguments))


def _show_all_text() -> None:
    """Let stdout and stderr write escapes, such as \\xe9, for characters that they have not: no run ends by a path."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _leave(status: int) -> NoReturn:
    """End this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_command(arguments: list[str]) -> int:
    """Do what the arguments say; return the exit status."""
    place = find_place()
    # Before the imports, which take seconds; in the place of submitit's handlers.
    signals.listen(joined=place.size == 1, rank=place.rank)
    record = outcome.Record()
    try:
        request = _request(arguments)
        if request is None:
            return 0
        if place.size == 1:
            signals.leave_early()
        if request.launcher is not None and not any(point.config.dry_run for point in request.points):
            signals.release()  # nothing is trained here: who is told to end ends
            return _submit(request, arguments)
    except UserError as error:
        _complain(str(error), everywhere=True)
        record.end(error.status, str(error))
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        return _run(request.points, record)
    except KeyboardInterrupt:
        interrupted = "Interrupted. The same command goes on from the last checkpoint."
        _complain(interrupted, everywhere=True)
        record.end(INTERRUPTED, interrupted)
        return INTERRUPTED
    except Exception as error:
        record.end(1, f"{type(error).__name__}: {error}")
        raise  # what we broke keeps its traceback


def _request(arguments: list[str]) -> "Request | None":
    """Return the runs that are asked for, all of them checked; None where a question was answered instead."""
    if "--version" in arguments:
        from sae_train import __version__

        sys.stdout.write(f"sae-train {__version__}\n")
        return None
    from sae_train.cli import compose

    options = _parse(arguments)
    place, name = options.config_dir, options.config_name or compose.CONFIG_NAME
    if not (options.help or options.cfg or options.info or options.hydra_help or options.shell_completion):
        return compose.compose_request(options.overrides, sweep=options.multirun, config_dir=place, config_name=name)
    if options.help:
        from sae_train.cli.help import usage

        sys.stdout.write(usage(compose.offer(options.overrides, config_dir=place, config_name=name)))
    else:
        if options.cfg:
            compose.offer(options.overrides, config_dir=place, config_name=name)
        _ask_hydra([a for a in arguments if a not in options.overrides] + options.overrides)
    return None


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Return Hydra's options; flags that mean nothing here are ConfigErrors."""
    from hydra._internal.utils import get_args_parser

    options, unknown = get_args_parser().parse_known_intermixed_args(arguments)
    problems = [
        f"{flag}: settings take no dashes. Write {flag.lstrip('-')}."
        if "=" in flag
        else f"{flag}: no such flag. `sae-train --help` lists them."
        for flag in unknown
    ]
    if options.config_path:
        problems.append(f"--config-path={options.config_path}: would hide the package's choices. Use --config-dir.")
    if options.experimental_rerun:
        problems.append("--experimental-rerun: nothing is pickled here. Type the command of the run again.")
    if options.multirun and (options.cfg or options.info):
        problems.append("--multirun: --cfg and --info show one configuration. Remove it.")
    if (options.resolve or options.package) and not options.cfg:
        problems.append("--resolve and --package: only with --cfg.")
    raise_all(problems)
    return options


def _ask_hydra(arguments: list[str]) -> None:
    """Let Hydra print what it knows: `--cfg`, `--info`, `--hydra-help`, `--shell-completion`."""
    import hydra

    from sae_train.cli.compose import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE
    from sae_train.cli.schemas import register_schemas

    register_schemas()
    sys.argv[1:] = arguments  # flags first: Hydra's parser takes no flag between two settings
    ask = hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, version_base=VERSION_BASE)
    ask(_no_run)()


def _no_run(_: object) -> None:
    raise AssertionError("Hydra was asked a question and started a run")


def _submit(request: "Request", arguments: list[str]) -> int:
    """Send the runs of a sweep to SLURM; return the exit status."""
    from sae_train.sweeps.submit import submit_sweep

    options = _parse(arguments)
    flags = [f"--config-dir={Path(options.config_dir).resolve()}"] if options.config_dir else []
    flags += [f"--config-name={options.config_name}"] if options.config_name else []
    assert request.launcher is not None
    return submit_sweep(
        [[*flags, *point.overrides] for point in request.points],
        runs=Path(request.points[0].config.runs).expanduser(),
        launcher=request.launcher,
        task=run_point,
    )


def _run(points: "list[Point]", record: outcome.Record) -> int:
    """Make the runs, one after another; return the gravest exit status.

    In a sweep an error ends one point: it is reported, one of our own (status 1) with its traceback, and the next point
    has its turn. Several ranks stop there, because not all of them may have had the error.
    """
    prepare_threads()  # before torch is imported, which reads them; not earlier: jobs of SLURM would inherit them
    from sae_train.ranks.distributed import leave
    from sae_train.training.run import run

    place = find_place()
    statuses: dict[str, int] = {}
    problem: str | None = None
    in_use = False
    names = _names(points)
    for name, point in zip(names, points, strict=True):
        if name and place.rank == 0:
            sys.stderr.write(f"{name}\n")
        try:
            statuses[name] = run(point.config, overrides=point.overrides, entered=record.begin)
        except UserError as error:
            in_use = isinstance(error, DirectoryInUse)
            problem = f"{name}: {error}" if name else str(error)
            _complain(problem, everywhere=isinstance(error, Preempted))
            statuses[name] = error.status
        except Exception as error:
            if len(points) == 1 or place.size > 1:
                raise  # nothing comes after it here
            problem, in_use = f"{name}: {type(error).__name__}: {error}", False
            traceback.print_exc()
            _complain(f"{name}: failed with the error above, which is a fault of this program.", everywhere=False)
            statuses[name] = BROKEN
        if statuses[name] == PREEMPTED or (statuses[name] and place.size > 1):
            break
    unfinished = [name for name in names if statuses.get(name, UserError.status)]
    if len(points) > 1 and unfinished:
        _complain(f"Not finished: {'; '.join(unfinished)}.", everywhere=True)
    if not unfinished:
        with suppress(UserError):  # all is done: who is lost now is not missed
            leave()  # not earlier: a group of processes that was left cannot be joined again
    status = max(statuses.values())
    record.end(status, problem, in_use=in_use)
    return status


def _names(points: "list[Point]") -> list[str]:
    """Return what tells the runs of a sweep apart: 'run 2 of 4 (k=32)'; a single run needs no name."""
    if len(points) == 1:
        return [""]
    common = set.intersection(*(set(point.overrides) for point in points))
    own = [" ".join(text for text in point.overrides if text not in common) for point in points]
    return [f"run {number} of {len(points)} ({text})" for number, text in enumerate(own, start=1)]


def _complain(message: str, *, everywhere: bool) -> None:
    """Tell the user what went wrong; `everywhere`: all ranks have the same to say, so one does."""
    rank = find_place().rank
    if rank:
        if not everywhere:
            signals.release()  # the launcher ends the ranks that are left by SIGTERM: no longer a wish to save
        time.sleep(FIRST_RANK_SPEAKS)
        if everywhere:
            return
        message = f"rank {rank}: {message}"
    sys.stderr.write(f"{message}\n")
