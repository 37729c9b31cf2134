"""Exports to foreign formats.

Every SAE is checked first. All are written to a temporary directory, which is then renamed.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sae_train.errors import CheckpointError
from sae_train.formats import record
from sae_train.formats.durable import explained, sync_directory, sync_file, write_text
from sae_train.formats.foreign import Format, Opened, Origin, origin_of
from sae_train.formats.manifest import SaeManifest
from sae_train.formats.reading import read_json
from sae_train.formats.registry import formats_that_hold
from sae_train.formats.suite import FIGURES
from sae_train.phases import SILENT, Phases


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


def export(
    sources: Sequence[Source],
    to: Format,
    out: Path,
    *,
    model: str | None = None,
    layer: int | None = None,
    site: str | None = None,
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
        phases: receives the progress, in SAEs.

    Raises:
        CheckpointError: the format cannot hold one of the SAEs exactly, or `out` holds something else or cannot be
            written. Then `out` is as before.
    """
    check_out(out, [source.name for source in sources], to)
    with phases.of("checking", total=len(sources), unit="SAE"):
        for source in sources:
            _refuse(source, to)
            phases.advance(1)
    partial = out.with_name(f".{out.name}.partial")
    written: list[Written] = []
    with explained(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with phases.of("exporting", total=len(sources), unit="SAE"):
                for source in sources:
                    opened = source.open()
                    origin = origin_of(opened.manifest, model=model, layer=layer, site=site)
                    below = _folder(to, source, opened.manifest, origin, several=len(sources) > 1)
                    if (partial / below).exists() and below != PurePosixPath():
                        below = below.with_name(f"{below.name}-{source.name}")
                    _write(to, source, opened, origin, partial / below)
                    written.append(
                        Written(source=source, directory=out / below, manifest=opened.manifest, origin=origin)
                    )
                    phases.advance(1)
            if any(each.directory != out for each in written):
                write_text(partial / "suite.json", json.dumps([_entry(each, out) for each in written], indent=2) + "\n")
            _publish(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return written


def check_out(out: Path, names: Sequence[str], to: Format) -> None:
    """Refuse a directory that holds anything but an earlier export of the same SAEs to the same format."""
    with explained(out, what="read"):
        if not out.exists():
            return
        if not out.is_dir():
            raise CheckpointError(f"--out {out}: is a file. Choose a directory.")
        if not any(out.iterdir()):
            return
        records = [read_json(path) for path in sorted(out.rglob(record.FILE))]
    if not records or {(r.get("format"), r.get("name")) for r in records} != {(to.NAME, name) for name in names}:
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
    own = to.folder(manifest, origin)
    if own is not None:
        return own
    return PurePosixPath(source.name) if several else PurePosixPath()


def _write(to: Format, source: Source, opened: Opened, origin: Origin, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    to.write(opened.sae, opened.manifest, origin, directory)
    content = record.record_of(opened.manifest, origin, name=source.name, format_name=to.NAME, run=source.run)
    record.write_record(directory, content)
    for file in directory.iterdir():
        if file.is_file():
            sync_file(file)
    sync_directory(directory)


def _entry(written: Written, out: Path) -> dict[str, Any]:
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
        "path": written.directory.relative_to(out).as_posix(),
    }
    return {key: value for key, value in entry.items() if value is not None}


def _publish(partial: Path, out: Path) -> None:
    """Rename a complete directory to `out`. An earlier export there gives way."""
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)
