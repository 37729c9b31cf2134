"""The place of an export: prepared in a directory of its own, then renamed over an earlier export."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae_train.errors import CheckpointError
from sae_train.formats import record
from sae_train.formats.durable import sync_directory


@contextmanager
def prepared(place: Path) -> Iterator[Path]:
    """Make the directory in which an export is prepared, empty, and hold it until it is renamed.

    Raises:
        CheckpointError: another export to the same place is being prepared.
    """
    partial = place.parent / f".{place.name}.sae-export.partial"
    partial.mkdir(parents=True, exist_ok=True)
    held = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"--out {place}: another export is writing there. Wait for it.") from error
        if not partial.exists() or partial.stat().st_ino != os.fstat(held).st_ino:
            raise CheckpointError(f"--out {place}: another export has just written there. Try again.")
        for left in partial.iterdir():  # by an export that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield partial
    finally:
        os.close(held)


def publish(partial: Path, out: Path) -> None:
    """Rename a complete directory to `out`. An earlier export there gives way, or stays where that fails."""
    old = _old(out)
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)  # of an export that was killed
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        _restore(out)
        raise
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Take back what a killed export left in place of `out`. A directory of the user's is not touched."""
    old = _old(out)
    if any(old.rglob(record.FILE)):
        _restore(out)
    elif old.exists() and any(old.iterdir()):
        raise CheckpointError(f"{old}: an export to {out} needs this name for the earlier export. Rename it first.")


def _restore(out: Path) -> None:
    """Take back the earlier export, where a kill or an error came between the two renames of `publish`."""
    old = _old(out)
    if old.is_dir() and not os.path.lexists(out):
        old.rename(out)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.sae-export.old"
