"""The files of a checkpoint: their names, what each holds, and how damage shows.

`checkpoints/step_00001000/` holds

- `checkpoint.json`: step, counts, and the size and SHA-256 of every other file
- `stream.safetensors`: the loop's and the stream's state that all ranks share
- `lanes_0000_0003.safetensors`: lanes 0 to 3 of the stream, whole; one file from each rank
- `saes/NAME/shared.safetensors`: state of one SAE that all ranks share
- `saes/NAME/features_00000000_00001024.safetensors`: its rows of weights, moments and counters of features 0 to 1023

So another number of ranks, in another layout, can read what each of its ranks needs.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.ranks.interface import Ranks
from sae_train.sae.state import State

FORMAT = 3
"""Version of this layout; 1 had no folder for each SAE, 2 one site."""
NOTES = "checkpoint.json"
STREAM = "stream.safetensors"
SHARED = "shared.safetensors"
_FEATURES = re.compile(r"features_(\d+)_(\d+)\.safetensors")
_LANES = re.compile(r"lanes_(\d+)_(\d+)\.safetensors")


class SaeContents(NamedTuple):
    """The state of one SAE on one rank."""

    features: tuple[int, int]
    """lo, hi of the features that the rank holds."""
    state: State
    ranks: Ranks
    """The grid of ranks that hold the SAE."""


class Contents(NamedTuple):
    """All that one rank brings to a checkpoint. `Trainer.contents` makes it."""

    stream: dict[str, Tensor]
    """State of the loop and the stream that all ranks share."""
    lanes: dict[int, dict[str, Tensor]]
    """State of each lane that this rank owns: CPU tensors that no later step changes."""
    saes: dict[str, SaeContents]
    """The SAEs of which this rank holds features, by name."""


class Unreadable(CheckpointError):
    """The file system did not return a file. The file itself may be whole."""


def path_of(directory: Path, step: int) -> Path:
    """Return the path of a published checkpoint."""
    return directory / f"step_{step:08d}"


def partial_path_of(directory: Path, step: int) -> Path:
    """Return the path of a checkpoint that is being written."""
    return directory / f"tmp-step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a published checkpoint's path."""
    return int(path.name.removeprefix("step_"))


def published(directory: Path) -> list[Path]:
    """Return the published checkpoints, oldest first.

    Raises:
        CheckpointError: the directory is there and cannot be read; there may be checkpoints in it.
    """
    with reading(directory):
        found = [directory / name for name in names_in(directory) if re.fullmatch(r"step_\d{8,}", name)]
    return sorted(found, key=step_of)


def newest_step(directory: Path) -> int | None:
    """Return the step of the newest checkpoint, whole or not; None where none is there or can be seen."""
    try:
        found = published(directory)
    except CheckpointError:
        return None
    return step_of(found[-1]) if found else None


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory, none where there is no such directory.

    Raises:
        OSError: it cannot be listed, or it is a link to a directory that is not there.
    """
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        if directory.is_symlink():
            raise OSError(errno.ENXIO, "a link to what is not there") from None
        return []


def sae_file(name: str, file: str) -> str:
    """Return the path of a file of one SAE below the checkpoint, such as 'saes/NAME/shared.safetensors'."""
    return f"saes/{name}/{file}"


def features_file(lo: int, hi: int) -> str:
    """Return the name of the file of features lo to hi - 1."""
    return f"features_{lo:08d}_{hi:08d}.safetensors"


def features_in(file: str) -> tuple[int, int] | None:
    """Return lo, hi of the features in a file; None where the file holds no features."""
    matched = _FEATURES.fullmatch(file)
    return (int(matched[1]), int(matched[2])) if matched else None


def lanes_file(first: int, last: int) -> str:
    """Return the name of the file of lanes `first` to `last`."""
    return f"lanes_{first:04d}_{last:04d}.safetensors"


def has_lane(file: str, lane: int) -> bool:
    """Return whether a file holds a lane."""
    matched = _LANES.fullmatch(file)
    return matched is not None and int(matched[1]) <= lane <= int(matched[2])


def digest_of_notes(notes: dict[str, Any]) -> str:
    """Return the SHA-256 of checkpoint.json's other entries, which it holds itself."""
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256, as checkpoint.json holds them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what reading a broken file raises into a CheckpointError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError):
            raise CheckpointError(f"{path}: not a whole checkpoint: {error}.") from error
        raise Unreadable(f"{path}: cannot be read: {error}. Nothing was changed; see to it and try again.") from error
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:  # ValueError: not JSON
        raise CheckpointError(f"{path}: not a whole checkpoint: {error}.") from error
