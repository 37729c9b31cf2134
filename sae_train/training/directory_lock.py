"""The lock of a run's directory: one process trains in it at a time."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from sae_train.errors import CheckpointError, DirectoryInUse
from sae_train.formats.durable import explained

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""Errors of `flock` on a file system without locks: NFS without its lock service, Lustre mounted without `flock`."""
REQUEUED_WAITS = 30.0
"""Seconds that a requeued job gives the job before it to end: SLURM may start the one while the other is dying."""
LOCK = ".lock"


def lock(directory: Path) -> IO[str]:
    """Make a directory and return its lock file, which this process holds until the file is closed.

    The kernel closes the lock file of a process that dies.

    Raises:
        CheckpointError: the directory cannot be made or locked.
        DirectoryInUse: another process holds the lock.
    """
    patience = REQUEUED_WAITS if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0.0
    deadline = time.monotonic() + patience
    while True:
        with explained(directory):
            directory.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(file, directory):
                with explained(directory):
                    _sign(file)
                return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise DirectoryInUse(
                    f"{directory}: another process is training in it{_holder(file)}. Wait for it, or choose another "
                    "name=."
                ) from None
            time.sleep(0.5)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise CheckpointError(f"{directory}: cannot be locked: {error.strerror}.") from error
            raise CheckpointError(
                f"{directory}: its file system has no file locks ({error.strerror}), so nothing would keep two jobs "
                "from writing there at once. Choose another one with runs=DIR, or have it mounted with locks (Lustre: "
                "-o flock; NFS: with its lock service)."
            ) from error
        file.close()


def _is_current(file: IO[str], directory: Path) -> bool:
    """Return whether `file` is still the directory's lock file. A run that abandons the directory removes it."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), (directory / LOCK).stat())
    return False


def _sign(file: IO[str]) -> None:
    """Write this process into the lock file, for the message to a process that is refused."""
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file.seek(0)
    file.truncate()
    file.write(json.dumps(facts) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _holder(file: IO[str]) -> str:
    """Return the holder of a lock as text for a message; empty where it has not written yet."""
    try:
        facts = json.loads(file.read())
        job = f", SLURM job {facts['job']}" if facts["job"] else ""
        return f": process {facts['pid']} on {facts['host']}{job}, since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
