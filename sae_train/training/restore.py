"""Reading checkpoints: the newest whole one, and from it what a rank needs, whatever ranks wrote it."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks

NOTES = "checkpoint.json"
NOTED = ("step", "tokens", "files")
REPLICATED = "replicated.safetensors"


class _Unreadable(CheckpointError):
    """The file system would not give a file: that says nothing about the file."""


class Checkpoint(NamedTuple):
    """A checkpoint that was read and found whole."""

    notes: dict[str, Any]
    """step, tokens, identity, metrics_rows, seconds ... as given to `begin`."""
    replicated: dict[str, Tensor]
    features: Callable[[int, int], dict[str, Tensor]]
    """Returns the state [hi - lo, ...] of features lo to hi - 1."""
    lane_state: Callable[[int], dict[str, Tensor]]
    """Returns the state of one lane."""


def newest_step(directory: Path) -> int | None:
    """Return the step of the newest checkpoint, whole or not; None where none is there or can be seen."""
    try:
        found = finished(directory)
    except CheckpointError:
        return None
    return step_of(found[-1]) if found else None


def newest(directory: Path, *, ranks: Ranks, warn: Callable[[str], None], phases: Phases = SILENT) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where there is none; collective.

    The ranks share out the reading of the files; the first says which checkpoints are passed over and why.

    Raises:
        CheckpointError: on every rank, if a rank does not see the files that the first one sees, or cannot read one for
            a reason that is not in the file: to pass over it then would be to lose what comes after the one before it.
    """
    steps, problem = [], None
    if ranks.is_first:
        try:
            steps = [step_of(path) for path in finished(directory)]
        except CheckpointError as error:
            problem = error
    ranks.raise_together(problem)
    steps = ranks.gather_objects(steps)[0]
    while steps:
        path = place(directory, steps.pop())
        faults = ranks.gather_objects(_fault(path, ranks, phases))
        phases.meet()
        unseen = [rank for rank, fault in enumerate(faults) if isinstance(fault, FileNotFoundError)]
        if unseen and len(unseen) < ranks.size:
            raise CheckpointError(
                f"{path}: rank {unseen[0]} does not see it and others do. Put runs=DIR on a file system that all "
                "nodes share."
            )
        ranks.raise_together(next((found for found in faults if isinstance(found, _Unreadable)), None))
        fault = next((found for found in faults if found is not None), None)
        if fault is None:
            return load(path)
        if ranks.is_first:
            warn(f"{fault} {'Using the checkpoint before it.' if steps else 'None is left: starting over.'}")
    return None


def _fault(path: Path, ranks: Ranks, phases: Phases) -> Exception | None:
    """Return what is wrong with this rank's share of a checkpoint's files."""
    try:
        with _whole(path):
            if path.name not in _names(path.parent):
                return FileNotFoundError(f"{path}: gone.")
        files = sorted(_notes(path)["files"].items())
        _check(path, dict(files[ranks.rank :: ranks.size]), phases)
    except CheckpointError as error:
        return error
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint's notes and replicated state; the rest is read when asked for.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    notes = _notes(path)
    with _whole(path):
        replicated = load_file(str(path / REPLICATED))
    return Checkpoint(notes, replicated, _feature_reader(path, notes), _lane_reader(path, notes))


def _check(path: Path, files: dict[str, Any], phases: Phases) -> None:
    with _whole(path), phases.of("checking the checkpoint", total=sum(f["bytes"] for f in files.values()), unit="B"):
        for name, expected in files.items():
            if fingerprint(path / name) != expected:
                raise CheckpointError(f"{path / name}: damaged: its size or SHA-256 is not what was written.")
            phases.advance(expected["bytes"])


def _notes(path: Path) -> dict[str, Any]:
    with _whole(path):
        notes: dict[str, Any] = json.loads((path / NOTES).read_text(encoding="utf-8"))
        missing = [name for name in NOTED if name not in notes]
        if missing:
            raise CheckpointError(f"{path / NOTES}: damaged: lacks {', '.join(missing)}.")
        if notes.pop("sha256", None) != digest_of(notes) or notes["step"] != step_of(path):
            raise CheckpointError(f"{path / NOTES}: damaged: not what was written.")
    return notes


def digest_of(notes: dict[str, Any]) -> str:
    """Return the SHA-256 of a checkpoint's notes, which they carry themselves."""
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn what reading a broken file raises into a CheckpointError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            raise CheckpointError(f"{path}: not a whole checkpoint: {error}.") from error
        raise _Unreadable(f"{path}: cannot be read: {error}. Nothing was changed; see to it and try again.") from error
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:  # ValueError: not JSON
        raise CheckpointError(f"{path}: not a whole checkpoint: {error}.") from error


def place(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def finished(directory: Path) -> list[Path]:
    """Return the published checkpoints, oldest first.

    Raises:
        CheckpointError: the directory is there and cannot be read: none seen is not none there.
    """
    with _whole(directory):
        found = [directory / name for name in _names(directory) if re.fullmatch(r"step_\d{8,}", name)]
    return sorted(found, key=step_of)


def _names(directory: Path) -> list[str]:
    """Return what lies in a directory, nothing where there is none; a link to nowhere is not none."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        if directory.is_symlink():
            raise OSError(errno.ENXIO, "a link to what is not there") from None
        return []


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _feature_reader(path: Path, notes: dict[str, Any]) -> Callable[[int, int], dict[str, Tensor]]:
    """Return a reader of some features' state; only the asked-for rows are read."""

    def read(lo: int, hi: int) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for name in sorted(notes["files"]):
            matched = re.fullmatch(r"features_(\d+)_(\d+)\.safetensors", name)
            if matched is None or int(matched[1]) >= hi or int(matched[2]) <= lo:
                continue
            first, last = max(lo - int(matched[1]), 0), min(hi, int(matched[2])) - int(matched[1])
            with _whole(path), safe_open(str(path / name), framework="pt") as file:
                keys = file.keys()
                for key in keys:
                    parts.setdefault(key, []).append(file.get_slice(key)[first:last])
        state = {key: torch.cat(rows) for key, rows in parts.items()}
        if not state or any(len(rows) != hi - lo for rows in state.values()):
            raise CheckpointError(f"{path}: does not hold features {lo} to {hi - 1}.")
        return state

    return read


def _lane_reader(path: Path, notes: dict[str, Any]) -> Callable[[int], dict[str, Tensor]]:
    """Return a reader of one lane's state; only the asked-for tensors are read."""

    def read(lane: int) -> dict[str, Tensor]:
        for name in notes["files"]:
            matched = re.fullmatch(r"lanes_(\d+)_(\d+)\.safetensors", name)
            if matched and int(matched[1]) <= lane <= int(matched[2]):
                with _whole(path), safe_open(str(path / name), framework="pt") as file:
                    prefix, keys = f"{lane}/", file.keys()
                    names = [key for key in keys if key.startswith(prefix)]
                    return {key.removeprefix(prefix): file.get_tensor(key) for key in names}
        raise CheckpointError(f"{path}: holds no lane {lane}; it was written with another harvest.lanes.")

    return read
