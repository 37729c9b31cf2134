"""Reading checkpoints: the newest whole one, and from it what a rank needs, whatever ranks wrote it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.state import State
from sae_train.training import checkpoint_files as files

NEEDED = ("step", "tokens", "files")
"""What every checkpoint.json holds, at least."""


class OldLayout(CheckpointError):
    """A checkpoint of an older version of this program, which this version does not read."""


class Checkpoint:
    """A checkpoint that was read and found whole; `newest` and `load` make it, `Trainer.restore` reads from it.

    Attributes:
        notes: step, tokens, identity, metrics_rows, seconds ... as given to `checkpoint.begin`.
        stream: state of the loop and the stream that all ranks share.
    """

    def __init__(self, path: Path, notes: dict[str, Any]) -> None:
        """Read the shared state; lanes and features are read when they are asked for.

        Raises:
            CheckpointError: a file is missing or cannot be read.
        """
        self.path, self.notes = path, notes
        with files.reading(path):
            self.stream = load_file(str(path / files.STREAM))

    def sae_names(self) -> list[str]:
        """Return the names of the SAEs in the checkpoint."""
        end = f"/{files.SHARED}"
        return [file.removeprefix("saes/").removesuffix(end) for file in self.notes["files"] if file.endswith(end)]

    def sae_state(self, name: str, lo: int, hi: int) -> State:
        """Return the state of one SAE: the shared part, and rows [hi - lo, ...] of features lo to hi - 1.

        Only these rows are read.

        Raises:
            CheckpointError: the checkpoint has no such SAE, or not these features.
        """
        if name not in self.sae_names():
            raise CheckpointError(f"{self.path}: holds no SAE {name}; it has {', '.join(self.sae_names())}.")
        folder = files.sae_file(name, "")
        with files.reading(self.path):
            shared = load_file(str(self.path / folder / files.SHARED))
        parts: dict[str, list[Tensor]] = {}
        for file in sorted(self.notes["files"]):
            held = files.features_in(file.removeprefix(folder)) if file.startswith(folder) else None
            if held is None or held[0] >= hi or held[1] <= lo:
                continue
            first, last = max(lo - held[0], 0), min(hi, held[1]) - held[0]
            with files.reading(self.path), safe_open(str(self.path / file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    parts.setdefault(key, []).append(opened.get_slice(key)[first:last])
        rows = {key: torch.cat(blocks) for key, blocks in parts.items()}
        if not rows or any(len(row) != hi - lo for row in rows.values()):
            raise CheckpointError(f"{self.path}: does not hold features {lo} to {hi - 1} of {name}.")
        return State(shared, rows)

    def lane_state(self, lane: int) -> dict[str, Tensor]:
        """Return the state of one lane of the stream; only its tensors are read.

        Raises:
            CheckpointError: the checkpoint has no such lane.
        """
        prefix = f"{lane}/"
        for file in self.notes["files"]:
            if files.has_lane(file, lane):
                with files.reading(self.path), safe_open(str(self.path / file), framework="pt") as opened:
                    names = [key for key in opened.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
                    return {key.removeprefix(prefix): opened.get_tensor(key) for key in names}
        raise CheckpointError(f"{self.path}: holds no lane {lane}; it was written with another harvest.lanes.")


def newest(directory: Path, *, ranks: Ranks, warn: Callable[[str], None], phases: Phases = SILENT) -> Checkpoint | None:
    """Return the newest whole checkpoint, or None where there is none. Collective.

    Each rank checks a part of the files. The first rank warns of checkpoints that are passed over, with the reason.

    Raises:
        CheckpointError: on every rank, if a rank does not see the files that the first one sees, or if a file cannot be
            read for a reason that is not in the file. To pass over that checkpoint would lose the training since the
            one before it. Also where the newest checkpoint has the layout of an older version.
    """
    steps, problem = [], None
    if ranks.is_first:
        try:
            steps = [files.step_of(path) for path in files.published(directory)]
        except CheckpointError as error:
            problem = error
    ranks.raise_together(problem)
    steps = ranks.gather_objects(steps)[0]
    while steps:
        path = files.path_of(directory, steps.pop())
        faults = ranks.gather_objects(_fault(path, ranks, phases))
        phases.meet()
        unseen = [rank for rank, fault in enumerate(faults) if isinstance(fault, FileNotFoundError)]
        if unseen and len(unseen) < ranks.size:
            raise CheckpointError(
                f"{path}: rank {unseen[0]} does not see it and others do. Put runs=DIR on a file system that all "
                "nodes share."
            )
        stops = (found for found in faults if isinstance(found, files.Unreadable | OldLayout))
        ranks.raise_together(next(stops, None))
        fault = next((found for found in faults if found is not None), None)
        if fault is None:
            return load(path)
        if ranks.is_first:
            warn(f"{fault} {'Using the checkpoint before it.' if steps else 'None is left: starting over.'}")
    return None


def load(path: Path) -> Checkpoint:
    """Return the checkpoint in a directory, of which only checkpoint.json is checked.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    return Checkpoint(path, _notes(path))


def _fault(path: Path, ranks: Ranks, phases: Phases) -> Exception | None:
    """Return the first fault in this rank's part of a checkpoint's files, or None."""
    try:
        with files.reading(path):
            if path.name not in files.names_in(path.parent):
                return FileNotFoundError(f"{path}: gone.")
        listed = sorted(_notes(path)["files"].items())
        _check(path, dict(listed[ranks.rank :: ranks.size]), phases)
    except CheckpointError as error:
        return error
    return None


def _check(path: Path, listed: dict[str, Any], phases: Phases) -> None:
    total = sum(facts["bytes"] for facts in listed.values())
    with files.reading(path), phases.of("checking the checkpoint", total=total, unit="B"):
        for name, expected in listed.items():
            if files.digest_of_file(path / name) != expected:
                raise CheckpointError(f"{path / name}: damaged: its size or SHA-256 is not what was written.")
            phases.advance(expected["bytes"])


def _notes(path: Path) -> dict[str, Any]:
    """Return the entries of checkpoint.json, checked against its own SHA-256."""
    place = path / files.NOTES
    with files.reading(path):
        notes: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        missing = [name for name in NEEDED if name not in notes]
        if missing:
            raise CheckpointError(f"{place}: damaged: lacks {', '.join(missing)}.")
        if notes.pop("sha256", None) != files.digest_of_notes(notes) or notes["step"] != files.step_of(path):
            raise CheckpointError(f"{place}: damaged: not what was written.")
    if notes.get("format") != files.FORMAT:
        raise OldLayout(
            f"{path}: written by another version of sae-train, in layout {notes.get('format', 1)}; this one reads "
            f"layout {files.FORMAT}. Finish the run with the version that began it (config.yaml names its commit), "
            f"remove {path.parent} to start it over, or choose another name=."
        )
    return notes
