"""Checkpoints: whole or not there.

`checkpoints/step_00001000/` holds `replicated.safetensors` (what all ranks share), one `lanes_*.safetensors` a rank
(the lanes that it owns, whole, so that another rank may take any of them) and `checkpoint.json` (step, counts, and the
size and SHA-256 of every file). It is written under a temporary name, fsynced, and renamed.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.formats.durable import explained, sync_directory, sync_file, write_text
from sae_train.ranks import Ranks

NOTES = "checkpoint.json"
NOTED = ("step", "tokens", "files")
REPLICATED = "replicated.safetensors"


class Checkpoint(NamedTuple):
    """A checkpoint that was read and found whole."""

    notes: dict[str, Any]
    """step, tokens, metrics_rows, seconds ... as given to `save`."""
    replicated: dict[str, Tensor]
    lane_state: Callable[[int], dict[str, Tensor]]
    """Returns the state of one lane."""


def save(
    directory: Path,
    *,
    notes: dict[str, Any],
    replicated: dict[str, Tensor],
    lane_states: dict[int, dict[str, Tensor]],
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write a checkpoint, from all ranks at once, then drop all but the newest `keep` (0 keeps all).

    Raises:
        CheckpointError: on every rank, if any rank could not write; earlier checkpoints stay as they were.
    """
    final = _place(directory, notes["step"])
    partial = directory / f"tmp-step_{notes['step']:08d}"
    files: dict[str, Any] = {}
    problem: CheckpointError | None = None
    try:
        if ranks.is_first:
            with explained(directory):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
    except CheckpointError as error:
        problem = error
    ranks.raise_together(problem)
    try:
        files = _write_share(partial, replicated if ranks.is_first else {}, lane_states)
    except CheckpointError as error:
        problem = error
    shares = ranks.gather_objects((files, problem))
    problem = next((found for _, found in shares if found is not None), None)
    if problem is None and ranks.is_first:
        try:
            _publish(partial, final, notes | {"files": {k: v for share, _ in shares for k, v in share.items()}})
            _prune(directory, keep=keep, newest=final)
        except CheckpointError as error:
            problem = error
    if problem is not None and ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    ranks.raise_together(problem)
    return final


def newest(directory: Path, *, ranks: Ranks, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where there is none; collective.

    The first rank looks, says which ones it passes over and why, and decides for all.

    Raises:
        CheckpointError: on every rank, if another rank cannot read the one that was chosen.
    """
    found = _newest_here(directory, warn) if ranks.is_first else None
    step = ranks.gather_objects(found.notes["step"] if found else None)[0]
    problem = None
    if step is not None and not ranks.is_first:
        try:
            found = load(_place(directory, step))
        except CheckpointError as error:
            problem = error
    ranks.raise_together(problem)
    return found


def _newest_here(directory: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    paths = _finished(directory)
    while paths:
        try:
            return load(paths.pop())
        except CheckpointError as error:
            warn(f"{error} {'Using the checkpoint before it.' if paths else 'None is left: starting over.'}")
    return None


def _place(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def load(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    try:
        notes = json.loads((path / NOTES).read_text(encoding="utf-8"))
        for name, expected in notes["files"].items():
            if _fingerprint(path / name) != expected:
                raise CheckpointError(f"{path / name}: damaged: its size or SHA-256 is not what was written.")
        replicated = load_file(str(path / REPLICATED))
        missing = [name for name in NOTED if name not in notes]
        if missing:
            raise CheckpointError(f"{path / NOTES}: damaged: lacks {', '.join(missing)}.")
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        SafetensorError,
    ) as error:  # ValueError: not JSON, not UTF-8
        raise CheckpointError(f"{path}: not a whole checkpoint: {error}.") from error
    return Checkpoint(notes, replicated, _lane_reader(path, notes))


def _write_share(partial: Path, replicated: dict[str, Tensor], lanes: dict[int, dict[str, Tensor]]) -> dict[str, Any]:
    """Write this rank's files; return their fingerprints by name."""
    shares = {REPLICATED: replicated} if replicated else {}
    if lanes:
        name = f"lanes_{min(lanes):04d}_{max(lanes):04d}.safetensors"
        shares[name] = {f"{lane}/{key}": value for lane, state in lanes.items() for key, value in state.items()}
    written = {}
    for name, tensors in shares.items():
        path = partial / name
        with explained(partial):
            try:
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, str(path))
            except SafetensorError as error:
                raise CheckpointError(f"{path}: cannot be written: {error}. Free space there.") from error
            sync_file(path)
            written[name] = _fingerprint(path)
    return written


def _publish(partial: Path, final: Path, notes: dict[str, Any]) -> None:
    """Give a whole checkpoint its name."""
    write_text(partial / NOTES, json.dumps(notes, indent=2) + "\n")
    with explained(final):
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync_directory(final.parent)


def _prune(directory: Path, *, keep: int, newest: Path) -> None:
    """Remove what killed writers left, what is later than the newest, and all but `keep` of the rest (0 keeps all).

    A later one is damaged, or this run would have gone on from it; counted as good it would crowd out good ones.
    """
    found = _finished(directory)
    place = found.index(newest) + 1
    old = found[: max(place - keep, 0)] if keep else []
    for path in [*directory.glob("tmp-step_*"), *old, *found[place:]]:
        shutil.rmtree(path, ignore_errors=True)


def _finished(directory: Path) -> list[Path]:
    """Return the published checkpoints, oldest first."""
    found = [path for path in directory.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _lane_reader(path: Path, notes: dict[str, Any]) -> Callable[[int], dict[str, Tensor]]:
    """Return a reader of one lane's state; only the asked-for tensors are read."""

    def read(lane: int) -> dict[str, Tensor]:
        for name in notes["files"]:
            matched = re.fullmatch(r"lanes_(\d+)_(\d+)\.safetensors", name)
            if matched and int(matched[1]) <= lane <= int(matched[2]):
                with safe_open(str(path / name), framework="pt") as file:
                    prefix = f"{lane}/"
                    names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
                    return {key.removeprefix(prefix): file.get_tensor(key) for key in names}
        raise CheckpointError(f"{path}: holds no lane {lane}; it was written with another harvest.lanes.")

    return read
