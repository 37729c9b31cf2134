"""`sae_train.load`: an SAE by path or Hub id, in our format or any that this room reads."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from sae_train.errors import CheckpointError, suggest
from sae_train.formats import hub_files, native
from sae_train.formats.folding import NotFinite
from sae_train.formats.foreign import Format, Opened
from sae_train.formats.reading import explained, listed
from sae_train.formats.record import name_in, with_record
from sae_train.formats.registry import FORMATS
from sae_train.hub import SCHEME, address_of
from sae_train.sae.autoencoder import SparseAutoencoder

DEEPEST = 6
"""Folders below a directory in which SAEs are looked for. gemma_scope has four."""


def load(path: str | Path, name: str | None = None, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """Load an SAE: of a run, of an export, or of another program.

    Example: `load("runs/suite", "residual2.mutual_choice.k32.f2048.s0")`.

    Args:
        path: a run's directory; a directory or file in our format or a foreign one (docs/formats.md); or
            `hf://ORG/NAME`, `hf://ORG/NAME@REVISION/FOLDER` on the Hugging Face Hub (docs/hub.md).
        name: the SAE of a directory with several: as in `saes/NAME/`, else its folder below `path`, or its name in the
            run that it comes from.
        device: the device of its tensors.

    Returns:
        The SAE in eval mode, fp32, on raw activations. Its `config` is the content of sae.json. A foreign file's config
        also has `format` and `assumed`, a list of sentences. Each of these is also a warning.

    Raises:
        CheckpointError: there is no SAE there, there are several and no name is given, the files are damaged, or the
            native form cannot hold the SAE exactly.
    """
    where, name = located(path, name)
    if native.holds_saes(where):
        return native.load(where, name, device=device)
    return opened(where, name).finished().to(device)


def located(path: str | Path, name: str | None = None) -> tuple[Path, str | None]:
    """Return a local path, and the name of the SAE there. An SAE on the Hub is downloaded, and its name is settled."""
    text = re.sub("^hf:/+", SCHEME, str(path))  # a Path has one slash there
    if text.startswith(SCHEME):
        return hub_files.fetch(address_of(text), name), None
    return Path(path).expanduser(), name


def opened(path: Path, name: str | None = None) -> Opened:
    """Return an SAE of a foreign format with all that is known of it. Arguments and errors are those of `load`."""
    each, file = find_foreign(path, name)
    with explained(path):
        _check_inside(file, path)
    try:
        found = each.read(file)
    except NotFinite as error:
        raise CheckpointError(f"{file}: {error}") from error
    found = with_record(found, file.parent, format_name=each.NAME)
    if found.sae.k == 0:
        found = replace(
            found, assumed=(*found.assumed, "k=0, because the files do not say how many features are active.")
        )
    return found


def find_foreign(path: Path, name: str | None = None) -> tuple[Format, Path]:
    """Return the format and the main file of the only SAE at `path`, or of the one in the folder `name` below it."""
    with explained(path):
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory. Give a run, an export, or hf://ORG/NAME.")
        found = foreign_saes(path)
    if name is not None and name in found:
        return found[name]
    if name is not None:
        by_record = [(each, file) for each, file in found.values() if name_in(file.parent) == name]
        if len(by_record) == 1:
            return by_record[0]
    files = {} if found else _files_in(path)
    if name in files:
        return files[str(name)]
    if files:
        wrong = "" if name is None else f", and none is named {name!r}"
        raise CheckpointError(f"{path}: holds {len(files)} files that may be an SAE each{wrong}. Give the name of one, "
                              f"as in load(PATH, NAME): {listed(files)}.")  # fmt: skip
    if not found:
        raise CheckpointError(
            f"{path}: holds no SAE of a known format: ours (sae.json), {', '.join(FORMATS)}. Give its directory."
        )
    folders = "".join(f"\n  {each}" for each in found)
    if name is not None:
        raise CheckpointError(f"{path}: holds no SAE {name!r}.{suggest(name, found) or folders}")
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: holds {len(found)} SAEs. Give the name of one, as in load(PATH, NAME).{folders}"
        )
    return next(iter(found.values()))


def foreign_saes(path: Path) -> dict[str, tuple[Format, Path]]:
    """Return the format and the main file of each SAE of a foreign format at or below `path`, by its folder."""
    return {_name_of(file, path): (each, file) for each, file in _all(path, DEEPEST)}


def _files_in(path: Path) -> dict[str, tuple[Format, Path]]:
    """Return the format of each file in a directory with several SAEs, such as Qwen Scope's layers, by its name."""
    with explained(path):
        files = sorted(path.iterdir()) if path.is_dir() else []
        return {file.name: (each, file) for file in files for each in FORMATS.values() if _is_file_of(each, file)}


def _is_file_of(each: Format, file: Path) -> bool:
    return file.is_file() and each.find(file) is not None


def _name_of(file: Path, path: Path) -> str:
    return file.parent.relative_to(path).as_posix() if file != path else file.name


def _all(path: Path, depth: int) -> Iterator[tuple[Format, Path]]:
    """Yield the format and main file of each SAE at or below `path`. Links to directories are not followed."""
    here = [(each, file) for each in FORMATS.values() if (file := each.find(path)) is not None]
    yield from here
    if here or depth == 0 or not path.is_dir():
        return
    for below in sorted(path.iterdir()):
        if below.is_dir() and not below.is_symlink() and not below.name.startswith("."):
            yield from _all(below, depth - 1)


def _check_inside(file: Path, given: Path) -> None:
    """Refuse links out of the directory that was given, other than those of the Hub's cache into its own blobs.

    Blobs are those of the repository, or those that repositories share.
    """
    root = (given if given.is_dir() else given.parent).resolve()
    cache = next((parent for parent in root.parents if parent.name.startswith("models--")), None)
    allowed = [root] if cache is None else [root, cache / "blobs", cache.parent / "blobs"]
    for each in file.parent.iterdir():
        target = each.resolve()
        if each.is_symlink() and not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{each}: is a link to {target}, outside of {given}. Copy the file there instead.")
