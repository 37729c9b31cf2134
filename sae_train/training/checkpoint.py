"""Writing checkpoints: whole or not there.

`checkpoints/step_00001000/` holds `replicated.safetensors` (what all ranks share), and from every rank one
`features_LO_HI.safetensors` (rows of weights, moments and counters of features LO to HI-1) and one
`lanes_*.safetensors` (the lanes that it owns, whole), so that another number of ranks, in another layout, may each read
what it needs; `checkpoint.json` says step, counts, and the size and SHA-256 of every file. All ranks write at once,
under a temporary name; it is fsynced, and renamed. Files may be written beside the training step, by a thread of each
rank that speaks to no other, from copies that were taken at once; the name is given where the ranks meet again.
"""

import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.formats.durable import explained, sync_directory, sync_file, write_text
from sae_train.harvest.prefetch import Outcome
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.training.restore import NOTES, REPLICATED, digest_of, fingerprint, finished, place


def begin(
    directory: Path,
    *,
    notes: dict[str, Any],
    replicated: dict[str, Tensor],
    features: tuple[int, int],
    feature_state: dict[str, Tensor],
    lane_states: dict[int, dict[str, Tensor]],
    ranks: Ranks,
    keep: int,
    beside: bool = False,
    phases: Phases = SILENT,
) -> "Saving":
    """Begin to write a checkpoint, from all ranks at once; it is there once `publish` has been called.

    Args:
        notes: JSON values; `step` names the checkpoint.
        replicated: what is the same on every rank; the first writes it.
        features: lo, hi of the features that this rank holds.
        feature_state: tensors [hi - lo, ...]; the ranks that hold the same features write a share each.
        lane_states: of this rank's lanes; CPU tensors that nothing changes any more.
        keep: how many of the newest to leave when it is published; 0 keeps all.
        beside: write in a thread, the other tensors as they are now, from copies; else write before this returns.

    Raises:
        CheckpointError: on every rank, if the first cannot make the directory; earlier checkpoints stay as they were.
    """
    partial = directory / f"tmp-step_{notes['step']:08d}"
    problem: CheckpointError | None = None
    try:
        if ranks.is_first:
            with explained(directory):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
    except CheckpointError as error:
        problem = error
    ranks.raise_together(problem)
    own, replicated = _own_share(features, feature_state, ranks), replicated if ranks.is_first else {}
    if beside:
        own, replicated = (*own[:2], _copied(own[2])), _copied(replicated)
    shares = _shares(replicated, own, lane_states)
    if beside:
        phases = SILENT  # a thread writes, and the step has the bar
    final = place(directory, notes["step"])
    return Saving(partial, final, shares, notes=notes, ranks=ranks, keep=keep, beside=beside, phases=phases)


class Saving:
    """A checkpoint whose files are written, or being written. Ends with `publish`; else it was never there.

    Attributes:
        step: that it is of.
    """

    def __init__(
        self,
        partial: Path,
        final: Path,
        shares: dict[str, dict[str, Tensor]],
        *,
        notes: dict[str, Any],
        ranks: Ranks,
        keep: int,
        beside: bool,
        phases: Phases = SILENT,
    ) -> None:
        self.step: int = notes["step"]
        self._partial, self._final, self._notes, self._ranks, self._keep = partial, final, notes, ranks, keep
        self._phases = phases
        self._has_ended = threading.Event()  # of an interrupted Thread.join nothing is certain
        if beside:
            threading.Thread(target=self._write, args=(shares,), name="checkpoint", daemon=True).start()
        else:
            self._write(shares)

    def _write(self, shares: dict[str, dict[str, Tensor]]) -> None:
        self._written = Outcome(lambda: _write(self._partial, shares, self._phases))
        self._has_ended.set()

    def is_written(self) -> bool:
        """Return whether no rank's files are waited for any more. Collective."""
        return all(self._ranks.gather_objects(self._has_ended.is_set()))

    def publish(self) -> Path:
        """Wait for this rank's files, give the checkpoint its name once all are there, and drop older ones. Collective.

        Raises:
            CheckpointError: on every rank, if any rank could not write; earlier checkpoints stay as they were.
        """
        self._has_ended.wait()
        files: dict[str, Any] = {}
        problem: CheckpointError | None = None
        try:
            files = self._written.get()
        except CheckpointError as error:
            problem = error
        shares = self._ranks.gather_objects((files, problem))
        problem = next((found for _, found in shares if found is not None), None)
        if problem is None and self._ranks.is_first:
            written = {name: facts for share, _ in shares for name, facts in share.items()}
            try:
                _publish(self._partial, self._final, self._notes | {"files": written})
                _prune(self._final.parent, keep=self._keep, newest=self._final)
            except CheckpointError as error:
                problem = error
        if problem is not None and self._ranks.is_first:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._ranks.raise_together(problem)
        return self._final


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _own_share(features: tuple[int, int], state: dict[str, Tensor], ranks: Ranks) -> tuple[int, int, dict[str, Tensor]]:
    """Return the features lo, hi that this rank writes, of those that it holds with others, and their state."""
    lo, hi = features
    first, last = ranks.data.slice(hi - lo)
    return lo + first, lo + last, {name: value[first:last] for name, value in state.items()}


def _shares(
    replicated: dict[str, Tensor],
    features: tuple[int, int, dict[str, Tensor]],
    lanes: dict[int, dict[str, Tensor]],
) -> dict[str, dict[str, Tensor]]:
    """Return what each of this rank's files holds, by their names."""
    shares = {REPLICATED: replicated} if replicated else {}
    lo, hi, state = features
    if hi > lo:
        shares[f"features_{lo:08d}_{hi:08d}.safetensors"] = state
    if lanes:
        name = f"lanes_{min(lanes):04d}_{max(lanes):04d}.safetensors"
        shares[name] = {f"{lane}/{key}": value for lane, state in lanes.items() for key, value in state.items()}
    return shares


def _write(partial: Path, shares: dict[str, dict[str, Tensor]], phases: Phases) -> dict[str, Any]:
    """Write this rank's files; return their fingerprints by name."""
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
                written[name] = fingerprint(path)
            phases.count(sizes[name])
    return written


def _publish(partial: Path, final: Path, notes: dict[str, Any]) -> None:
    """Give a whole checkpoint its name."""
    write_text(partial / NOTES, json.dumps(notes | {"sha256": digest_of(notes)}, indent=2) + "\n")
    with explained(final):
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync_directory(final.parent)


def _prune(directory: Path, *, keep: int, newest: Path) -> None:
    """Remove what killed writers left, what is later than the newest, and all but `keep` of the rest (0 keeps all).

    A later one is damaged, or this run would have gone on from it; counted as good it would crowd out good ones.
    """
    try:
        found = finished(directory)
    except CheckpointError:  # what is too much goes the next time
        return
    place = found.index(newest) + 1
    old = found[: max(place - keep, 0)] if keep else []
    for path in [*old, *found[place:]]:
        with suppress(OSError):
            _remove(path)
    for path in directory.glob("tmp-step_*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Take a checkpoint's name away, then its files: who is killed between them leaves nothing that looks whole."""
    unnamed = path.with_name(f"tmp-{path.name}-old")
    shutil.rmtree(unnamed, ignore_errors=True)
    path.rename(unnamed)
    shutil.rmtree(unnamed, ignore_errors=True)
