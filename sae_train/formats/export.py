"""Exports to a format: foreign ones, and our own for an upload.

Every SAE is checked first. All are written to a temporary directory, which is then renamed.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from safetensors import SafetensorError

from sae_train.errors import CheckpointError
from sae_train.formats import own, record
from sae_train.formats.comparison import Verified
from sae_train.formats.durable import explained, sync_directory, sync_file, write_text
from sae_train.formats.foreign import GIVES_ONE, Format, Opened, Origin, origin_of
from sae_train.formats.manifest import SaeManifest
from sae_train.formats.placing import prepared, publish, recover
from sae_train.formats.reading import read_json
from sae_train.formats.registry import formats_that_hold
from sae_train.formats.suite import FIGURES
from sae_train.phases import SILENT, Phases
from sae_train.sae.autoencoder import SparseAutoencoder

BESIDE = ("suite.json", "README.md")
"""Files that an export may have at its top besides its SAEs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One SAE to export. The command line makes it."""

    name: str
    """Its name in the run, or its folder."""
    open: Callable[[], Opened]
    """Loads it. Called twice, so that only one SAE is in memory at a time."""
    run: Mapping[str, Any] | None
    """config.yaml of the run that trained it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One SAE that was exported. `export` makes it."""

    source: Source
    directory: Path
    manifest: SaeManifest
    origin: Origin
    verified: Verified | None = None
    """Result of the comparison with the SAE that was exported; None without one."""

    def folder(self, out: Path) -> PurePosixPath:
        """Return its folder below the export's directory."""
        return PurePosixPath(self.directory.relative_to(out).as_posix())


class Check(Protocol):
    """Compares a written SAE with the SAE that was exported."""

    def __call__(self, to: Format, directory: Path, sae: SparseAutoencoder) -> Verified | None: ...


def export(
    sources: Sequence[Source],
    to: Format,
    out: Path,
    *,
    model: str | None = None,
    layer: int | None = None,
    site: str | None = None,
    check: Check | None = None,
    complete: Callable[[Path, Sequence[Written]], None] | None = None,
    phases: Phases = SILENT,
) -> list[Written]:
    """Write SAEs in a foreign format. A single SAE goes straight into `out`, several into folders of their names.

    Formats with a layout of their own keep it in both cases. `sae_train.json` stands beside each SAE.

    Args:
        sources: the SAEs.
        to: the format.
        out: directory of the export. It is new or empty, or holds an earlier export of the same SAEs, which is
            replaced.
        model: replaces the recorded model in headers.
        layer: replaces the recorded block.
        site: replaces the recorded kind of site.
        check: called with each SAE once it is written, and raises where files and SAE differ.
        complete: called with the temporary directory once all SAEs are written; it may add files there.
        phases: receives the progress, in SAEs.

    Raises:
        CheckpointError: a check failed, the format cannot hold one of the SAEs exactly, or `out` holds something else
            or cannot be written. Then `out` is as before.
    """
    _check_names(sources)
    place = Path(os.path.realpath(out))  # a link stays, and the directory behind it is replaced
    with explained(out):
        recover(place)
    check_out(out, [source.name for source in sources], to)
    with phases.of("checking", total=len(sources), unit="SAE"):
        for source in sources:
            _refuse(source, to)
            phases.advance(1)
    written: list[Written] = []
    with explained(out), prepared(place) as partial:
        try:
            with phases.of("exporting", total=len(sources), unit="SAE"):
                for source in sources:
                    opened = source.open()
                    origin = _with_notes(origin_of(opened.manifest, model=model, layer=layer, site=site), opened)
                    manifest = _as_told(opened.manifest, origin, model=model, place=(layer, site))
                    below = _folder(to, source, manifest, origin, several=len(sources) > 1)
                    if (partial / below).exists() and below != PurePosixPath():
                        below = below.with_name(f"{below.name}-{source.name}")
                    _write(to, source, opened.sae, manifest, origin, partial / below)
                    found = None if check is None else check(to, partial / below, opened.sae)
                    written.append(
                        Written(source=source, directory=out / below, manifest=manifest, origin=origin, verified=found)
                    )
                    phases.advance(1)
            if any(each.directory != out for each in written):
                entries = [suite_entry_of(each, out) for each in written]
                write_text(partial / "suite.json", json.dumps(entries, indent=2) + "\n")
            if complete is not None:
                complete(partial, written)
            publish(partial, place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return written


def _check_names(sources: Sequence[Source]) -> None:
    """Refuse names that could lead out of the export's directory: those of foreign records may be anything."""
    for source in sources:
        if not record.is_plain_name(source.name):
            raise CheckpointError(f"{source.name!r}: the name of an SAE becomes a folder, and this is not one. Correct "
                                  f"`name` in its {record.FILE}.")  # fmt: skip


def check_out(out: Path, names: Sequence[str], to: Format) -> None:
    """Refuse a directory that holds anything but an earlier export of the same SAEs to the same format."""
    with explained(out, what="read"):
        if not out.exists():
            return
        if not out.is_dir():
            raise CheckpointError(f"--out {out}: is a file. Choose a directory.")
        place, here = Path(os.path.realpath(out)), Path.cwd()
        if here.is_relative_to(place):  # a shell in it would be left in a directory that is gone
            raise CheckpointError(
                f"--out {out}: holds the current directory, which an export would replace. Choose a directory below it."
            )
        there = {path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
        if not there:
            return
        records = {path: read_json(path) for path in sorted(there) if path.name == record.FILE}
    found = {(str(each.get("format")), str(each.get("name"))) for each in records.values()}
    known = {out / name for name in BESIDE} | set(records)
    for path, each in records.items():
        files = each.get("files")
        known |= {path.parent / str(name) for name in files} if isinstance(files, list) else set()
    if found != {(to.NAME, name) for name in names} or there - known:
        raise CheckpointError(
            f"--out {out}: holds something else than an earlier export of the same SAEs to {to.NAME}. Choose an empty "
            "or a new directory."
        )


def _refuse(source: Source, to: Format) -> None:
    sae = source.open().sae
    reason = to.refusal(sae)
    if reason is not None:
        able = formats_that_hold(sae)
        raise CheckpointError(f"--to {to.NAME}: cannot hold {source.name} exactly: {reason}. "
                              f"Formats that can: {', '.join(able)}.")  # fmt: skip


def _folder(to: Format, source: Source, manifest: SaeManifest, origin: Origin, *, several: bool) -> PurePosixPath:
    layout = to.folder(manifest, origin)
    if layout is not None:
        return layout
    if not several:
        return PurePosixPath()
    return PurePosixPath(own.PARENT, source.name) if to.NAME == own.NAME else PurePosixPath(source.name)


def _with_notes(origin: Origin, opened: Opened) -> Origin:
    """Return an origin that also holds the notes of the reader, but not those of an earlier export on the origin."""
    notes = [each for each in opened.assumed if not each.endswith(GIVES_ONE)]
    return replace(origin, assumed=(*origin.assumed, *notes))


def _as_told(
    manifest: SaeManifest, origin: Origin, *, model: str | None, place: tuple[int | None, str | None]
) -> SaeManifest:
    """Return the manifest with what the user gave, so that a later export begins with it."""
    if model is not None:
        manifest = replace(manifest, source=replace(manifest.source, model=model, revision=None))
    if place != (None, None):
        label = f"{origin.site}{origin.layer}"
        manifest = replace(manifest, site=label, source=replace(manifest.source, site=label, module=None, side=None))
    return manifest


def _write(
    to: Format, source: Source, sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    try:
        to.write(sae, manifest, origin, directory)
    except (RuntimeError, SafetensorError) as error:  # of torch.save and safetensors, where others raise OSError
        raise OSError(str(error).strip().splitlines()[0]) from error
    files = sorted(path.name for path in directory.iterdir())
    content = record.record_of(manifest, origin, name=source.name, format_name=to.NAME, run=source.run, files=files)
    record.write_record(directory, content)
    mode = (directory / record.FILE).stat().st_mode
    for file in directory.iterdir():
        if file.is_file():
            file.chmod(mode)  # safetensors makes files that no other user can read
            sync_file(file)
    sync_directory(directory)


def suite_entry_of(written: Written, out: Path) -> dict[str, Any]:
    """Return the entry of one SAE in suite.json, with the keys of a run's suite.json. What is not known is absent."""
    manifest, origin = written.manifest, written.origin
    entry = {
        "name": written.source.name,
        "site": manifest.site,
        "layer": origin.layer,
        "d_model": manifest.d_model,
        "width": manifest.n_features,
        "k": manifest.k,
        "sparsifier": manifest.sparsifier,
        "seed": manifest.seed,
        "model": origin.model,
        "revision": manifest.source.revision,
        "data": manifest.source.data,
        **{key: manifest.figures.get(key) for key in FIGURES},
        "tokens": manifest.tokens,
        "path": str(written.folder(out)),
    }
    return {key: value for key, value in entry.items() if value is not None}
