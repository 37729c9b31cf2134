"""Durable writes: a kill, a full disk or a power cut leaves the old file or the new one, never a part of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_train.errors import CheckpointError


@contextmanager
def explained(path: Path, *, what: str = "written") -> Iterator[None]:
    """Turn errors of the file system under `path` into a message for the user: it cannot be `what`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "Free space there, or choose" if what == "written" else "Choose"
        place = "another directory: runs=DIR for a run, --out DIR for an export"
        raise CheckpointError(f"{path}: cannot be {what}: {reason}. {advice} {place}.") from error


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by one that holds `text`, durably, by a rename.

    Bytes of a command line argument that are not UTF-8 are written as they were.
    """
    partial = path.with_name(f".{path.name}.partial")
    with explained(path.parent):
        try:
            with partial.open("w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Return once the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Return once the names in the directory are on the disk."""
    sync_file(path)
