"""Submission of a sweep: one SLURM job for each point that is neither finished nor under way.

submitit writes the sbatch script and pickles the call. Its results exist only for task 0 and only for jobs that were
never preempted, so the outcome of a job is read from the run's own file (outcome.py).
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from sae_train.config.launcher import SlurmLauncher
from sae_train.errors import ConfigError, raise_all
from sae_train.ranks.launcher_env import this_process
from sae_train.sweeps.directory import PointState, SweepDirectory

LOST = 1
"""Exit status of a point whose job ended without an outcome."""
PAUSE = 5.0
"""Seconds between two queries of the queue."""
STARTS_WITHIN = 3
"""Queries without any open job after which the jobs count as gone. SLURM lists a new job late."""

Task = Callable[[list[str], str], None]
"""The call of a job on every rank, with a point's arguments and its outcome file. It never returns."""


def check_ready(launcher: SlurmLauncher) -> None:
    """Refuse to submit where submission is not possible.

    Raises:
        ConfigError: lists everything that is missing.
    """
    problems = []
    if this_process().size > 1:
        problems.append("hydra/launcher=slurm: submits jobs, so start it once: without srun, torchrun or accelerate.")
    if launcher.submit and find_spec("submitit") is None:
        problems.append("hydra/launcher=slurm: needs submitit, which is not installed: pip install 'sae-train[slurm]'.")
    if launcher.submit and shutil.which("sbatch") is None:
        problems.append(
            "hydra/launcher=slurm: this machine has no sbatch. Start it on a login node of the cluster, or leave "
            "hydra/launcher out to make the runs here."
        )
    raise_all(problems)


def submit_sweep(points: Sequence[Sequence[str]], *, runs: Path, launcher: SlurmLauncher, task: Task) -> int:
    """Submit the unfinished points and, with `launcher.wait`, wait until all jobs have ended.

    Args:
        points: arguments of `sae-train` for each point.
        runs: directory in which the sweep's directory is created.
        launcher: resources of each job.
        task: the call of a job.

    Returns:
        The exit status: 0, or the gravest status of a point.

    Raises:
        UserError: no job could be submitted.
    """
    check_ready(launcher)
    sweep = SweepDirectory.made(runs.resolve(), points)
    _say(f"{sweep.path}: {len(sweep.points)} points")
    if not launcher.submit:
        _say(f"sbatch --array=0-{len(sweep.points) - 1} slurm/sweep.sbatch {sweep.path}")
        return 0
    names = sweep.names()
    with sweep.alone():
        states, _ = sweep.states()
        told = {state.index: (state.state, state.job) for state in states if state.is_done or state.is_open}
        for index in told:
            _say(_line(states[index]))
        due = [state.index for state in states if state.index not in told]
        if due:
            jobs = _submit(sweep, due, launcher=launcher, task=task)
            sweep.note_jobs(jobs)
            for index, job in jobs.items():
                _say(f"{index}: submitted as job {job}  {names[index]}")
    if not launcher.wait:
        return 0
    try:
        return _stay(sweep, told=told)
    except KeyboardInterrupt:
        _say(f"The jobs go on. `python scripts/sweep_status.py {sweep.path}` shows how; the same command waits again.")
        raise


def _submit(sweep: SweepDirectory, due: list[int], *, launcher: SlurmLauncher, task: Task) -> dict[int, str]:
    """Submit the points with these indices as one job array; return the job of each."""
    import submitit

    executor = submitit.SlurmExecutor(folder=sweep.logs)
    executor.update_parameters(
        job_name=sweep.path.name,
        partition=launcher.partition,
        account=launcher.account,
        time=math.ceil(launcher.hours * 60),
        nodes=launcher.nodes,
        ntasks_per_node=launcher.tasks_per_node,
        gpus_per_node=launcher.gpus or None,
        cpus_per_task=launcher.cpus_per_task,
        mem=None if launcher.memory_gb is None else f"{math.ceil(launcher.memory_gb * 1024)}M",
        signal_delay_s=launcher.signal_seconds,
        array_parallelism=launcher.max_parallel or len(due),
        wckey=None,
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={launcher.cpus_per_task}"],
        setup=["export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"],
        additional_parameters={"requeue": True, **launcher.extra},
    )
    try:
        with executor.batch():
            jobs = [executor.submit(task, sweep.arguments(index), str(sweep.outcome_path(index))) for index in due]
    except (submitit.core.utils.FailedJobError, OSError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ConfigError(f"hydra/launcher=slurm: sbatch refused the sweep: {reason}") from error
    return {index: str(job.job_id) for index, job in zip(due, jobs, strict=True)}


def _stay(sweep: SweepDirectory, *, told: dict[int, tuple[str, str | None]]) -> int:
    """Print each change of a state until no job is left; return the gravest exit status."""
    missed = 0
    while True:
        states, asked = sweep.states()
        for state in states:
            if told.get(state.index) != (state.state, state.job):
                told[state.index] = state.state, state.job
                _say(_line(state))
        missed = 0 if any(state.is_open for state in states) or not asked else missed + 1
        settled = all(state.is_done or state.status for state in states)
        if missed and (settled or missed >= STARTS_WITHIN):
            return max(0 if state.is_done else state.status or LOST for state in states)
        time.sleep(PAUSE)


def _line(state: PointState) -> str:
    note = f": {state.note}" if state.note else ""
    job = f" (job {state.job})" if state.job else ""
    return f"{state.index}: {state.state}{job}  {state.text}{note}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}{os.linesep}")
    sys.stdout.flush()
