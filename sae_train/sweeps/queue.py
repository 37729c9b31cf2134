"""SLURM's queue of jobs."""

import shutil
import subprocess
from collections.abc import Iterable

ANSWERS_WITHIN = 60.0
"""Seconds to wait for an answer of squeue."""


def queued(jobs: Iterable[str]) -> dict[str, str] | None:
    """Return SLURM's state of each of these jobs that has not ended; None if SLURM cannot be asked.

    Args:
        jobs: job numbers; `array_index` for a task of an array.
    """
    asked = set(jobs)
    if not asked:
        return {}
    if shutil.which("squeue") is None:
        return None
    numbers = ",".join(sorted({job.partition("_")[0] for job in asked}))
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={numbers}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWERS_WITHIN, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode:
        return {} if "Invalid job id" in done.stderr else None
    states = dict(line.split()[:2] for line in done.stdout.splitlines() if line.strip())
    return {job: states[job] for job in asked & states.keys()}
