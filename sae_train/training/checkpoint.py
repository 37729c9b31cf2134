"""Writing checkpoints so that each is whole or not there; checkpoint_files.py lists their files.

All ranks write their files at once, below a temporary name. The files are fsynced, and then the first rank renames the
directory. A background thread of each rank may write the files, from copies that are made first. The thread speaks to
no other rank; the checkpoint is published the next time that the ranks meet.
"""

import json
import shutil
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sae_train.config import CheckpointConfig
from sae_train.errors import CheckpointError, UserError
from sae_train.formats.durable import explained, sync_directory, sync_file, write_text
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.training import checkpoint_files as files
from sae_train.training.checkpoint_files import Contents, SaeContents
from sae_train.training.console import warn

Shares = dict[str, dict[str, Tensor]]
"""Tensors by name, by the path of their file below the checkpoint."""


class Saver:
    """Begins and publishes a run's checkpoints. The session makes one; all ranks call it at the same places.

    Attributes:
        saved_at: step of the newest checkpoint that this process has published or loaded, -1 before there is one.
        found_at: step of the newest checkpoint that was there before, as the first rank sees it; None without one.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, ranks: Ranks) -> None:
        self.saved_at = -1
        self.found_at = files.newest_step(directory) if ranks.is_first else None
        self._directory, self._config, self._ranks = directory, config, ranks
        self._saving: Saving | None = None

    def newest(self) -> int | None:
        """Return the step of the newest checkpoint, None where there is none."""
        return self.saved_at if self.saved_at >= 0 else self.found_at

    def save(self, contents: Contents, notes: dict[str, Any], *, may_go_on: bool, phases: Phases = SILENT) -> None:
        """Write a checkpoint, or begin to write one in the background.

        Args:
            contents: of this rank, saved as they are now.
            notes: see `begin`.
            may_go_on: whether training goes on meanwhile; else the checkpoint is published when this returns.
        """
        self.publish()
        beside = self._config.beside
        beside = self._ranks.device.type == "cuda" if beside is None else beside
        self._saving = begin(
            self._directory,
            contents,
            notes=notes,
            ranks=self._ranks,
            keep=self._config.keep,
            in_background=beside and may_go_on,
            phases=phases,
        )
        if not (beside and may_go_on):
            self.publish()

    def publish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and publish it."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.publish()
        except KeyboardInterrupt:
            self._saving = saving  # `publish_at_last` waits for it once more
            raise
        self.saved_at = saving.step

    def publish_if_written(self) -> None:
        """Publish the checkpoint that is being written if no rank has to wait for its files."""
        if self._saving is not None and self._saving.is_written():
            self.publish()

    def publish_at_last(self) -> None:
        """Publish while another exception is raised: where the disk or memory prevents it, only warn of that."""
        try:
            self.publish()
        except (UserError, MemoryError) as error:
            warn(f"the checkpoint that was being written is lost: {error}")


def begin(
    directory: Path,
    contents: Contents,
    *,
    notes: dict[str, Any],
    ranks: Ranks,
    keep: int,
    in_background: bool = False,
    phases: Phases = SILENT,
) -> "Saving":
    """Begin to write a checkpoint, from all ranks at once; `Saving.publish` ends it. Collective.

    Args:
        directory: holds the run's checkpoints.
        contents: of this rank. The first rank writes the state of the stream. Of each SAE, the first rank that holds it
            writes the shared state, and ranks that hold the same features split them.
        notes: JSON values; `step` names the checkpoint.
        keep: how many of the newest checkpoints to leave when it is published; 0 keeps all.
        in_background: copy the tensors and write the copies in a thread; else write before this returns.
        phases: shows the progress, unless a thread writes.

    Raises:
        CheckpointError: on every rank, if the first cannot make the directory; earlier checkpoints stay as they were.
    """
    partial = files.partial_path_of(directory, notes["step"])
    names = sorted({name for of_rank in ranks.gather_objects(list(contents.saes)) for name in of_rank})
    problem: CheckpointError | None = None
    try:
        if ranks.is_first:
            with explained(directory):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                for name in names:
                    (partial / files.sae_file(name, "")).mkdir(parents=True)
    except CheckpointError as error:
        problem = error
    ranks.raise_together(problem)
    shares = _shares(contents, ranks, copied=in_background)
    notes = {"format": files.FORMAT} | notes
    return Saving(partial, shares, notes=notes, ranks=ranks, keep=keep, in_background=in_background, phases=phases)


class Saving:
    """A checkpoint whose files are written, or being written. Without a call of `publish` it was never there.

    Attributes:
        step: step of the checkpoint.
    """

    def __init__(
        self,
        partial: Path,
        shares: Shares,
        *,
        notes: dict[str, Any],
        ranks: Ranks,
        keep: int,
        in_background: bool,
        phases: Phases,
    ) -> None:
        self.step: int = notes["step"]
        self._partial, self._final = partial, files.path_of(partial.parent, self.step)
        self._notes, self._ranks, self._keep = notes, ranks, keep
        self._written: Future[dict[str, Any]] = Future()  # also waits where Thread.join was interrupted once
        if in_background:
            work = threading.Thread(target=self._write, args=(shares, SILENT), name="checkpoint", daemon=True)
            work.start()
        else:
            self._write(shares, phases)

    def _write(self, shares: Shares, phases: Phases) -> None:
        try:
            written = _write(self._partial, shares, phases)
        except BaseException as error:
            self._written.set_exception(error)
        else:
            self._written.set_result(written)

    def is_written(self) -> bool:
        """Return whether the files of all ranks are written, or cannot be. Collective."""
        return all(self._ranks.gather_objects(self._written.done()))

    def publish(self) -> Path:
        """Wait for the files of all ranks, rename the checkpoint, and remove older ones. Collective.

        Raises:
            CheckpointError: on every rank, if any rank could not write; earlier checkpoints stay as they were.
        """
        written: dict[str, Any] = {}
        problem: CheckpointError | None = None
        try:
            written = self._written.result()
        except CheckpointError as error:
            problem = error
        of_ranks = self._ranks.gather_objects((written, problem))
        problem = next((found for _, found in of_ranks if found is not None), None)
        if problem is None and self._ranks.is_first:
            of_all = {name: facts for of_rank, _ in of_ranks for name, facts in of_rank.items()}
            try:
                _publish(self._partial, self._final, self._notes | {"files": of_all})
                _prune(self._final.parent, keep=self._keep, newest=self._final)
            except CheckpointError as error:
                problem = error
        if problem is not None and self._ranks.is_first:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._ranks.raise_together(problem)
        return self._final


def _shares(contents: Contents, ranks: Ranks, *, copied: bool) -> Shares:
    """Return the tensors of each file that this rank writes; `copied` to the host where later steps change them."""
    lanes = contents.lanes
    changing: Shares = {files.STREAM: contents.stream} if ranks.is_first else {}
    for name, sae in contents.saes.items():
        if sae.ranks.is_first:
            changing[files.sae_file(name, files.SHARED)] = sae.state.shared
        lo, hi, rows = _own_rows(sae)
        if hi > lo:
            changing[files.sae_file(name, files.features_file(lo, hi))] = rows
    if copied:
        changing = {file: _copied(tensors) for file, tensors in changing.items()}
    if lanes:
        of_lanes = {f"{lane}/{key}": value for lane, state in lanes.items() for key, value in state.items()}
        changing[files.lanes_file(min(lanes), max(lanes))] = of_lanes
    return changing


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _own_rows(sae: SaeContents) -> tuple[int, int, dict[str, Tensor]]:
    """Return the features lo, hi that this rank writes, of those that it holds with others, and their rows."""
    lo, hi = sae.features
    first, last = sae.ranks.data.slice(hi - lo)
    return lo + first, lo + last, {key: value[first:last] for key, value in sae.state.features.items()}


def _write(partial: Path, shares: Shares, phases: Phases) -> dict[str, Any]:
    """Write this rank's files; return their sizes and digests by name."""
    written = {}
    sizes = {name: sum(value.nbytes for value in tensors.values()) for name, tensors in shares.items()}
    with phases.of("writing a checkpoint", total=sum(sizes.values()), unit="B"):
        for name, tensors in shares.items():
            path = partial / name
            with explained(partial):
                try:
                    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, str(path))
                except SafetensorError as error:
                    raise CheckpointError(f"{path}: cannot be written: {error}. Free space there.") from error
                sync_file(path)
                written[name] = files.digest_of_file(path)
            phases.count(sizes[name])
    return written


def _publish(partial: Path, final: Path, notes: dict[str, Any]) -> None:
    """Rename a checkpoint whose files are all written."""
    with explained(partial):
        for folder in (*partial.glob("saes/*"), partial / "saes"):
            sync_directory(folder)
    digest = {"sha256": files.digest_of_notes(notes)}
    write_text(partial / files.NOTES, json.dumps(notes | digest, indent=2) + "\n")
    with explained(final):
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync_directory(final.parent)


def _prune(directory: Path, *, keep: int, newest: Path) -> None:
    """Remove partial files of killed writers, all checkpoints after `newest`, and all but `keep` (0 keeps all).

    A later checkpoint is damaged, or this run would have gone on from it. Counted as good it would displace good ones.
    """
    try:
        found = files.published(directory)
    except CheckpointError:  # the next checkpoint removes them
        return
    place = found.index(newest) + 1
    old = found[: max(place - keep, 0)] if keep else []
    for path in [*old, *found[place:]]:
        with suppress(OSError):
            _remove(path)
    for path in directory.glob("tmp-step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Rename a checkpoint, then remove its files, so that a kill in between leaves nothing that looks whole."""
    unnamed = path.with_name(f"tmp-{path.name}-old")
    shutil.rmtree(unnamed, ignore_errors=True)
    path.rename(unnamed)
    shutil.rmtree(unnamed, ignore_errors=True)
