"""Our own format, as an export: `sae.safetensors` and `sae.json`, with a record. An upload without `--to` uses it."""

from pathlib import Path, PurePosixPath

from sae_train.formats import native
from sae_train.formats.foreign import Opened, Origin
from sae_train.formats.manifest import SaeManifest
from sae_train.ranks.interface import Solo
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "sae_train"
HOLDS = "every SAE"
WEIGHTS = "sae.safetensors"
PARENT = "saes"
"""Folder of the SAEs of an export with several, as in a run's directory."""


def refusal(sae: SparseAutoencoder) -> str | None:
    return None


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    return None


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    native.save(sae, directory, manifest=manifest, ranks=Solo())


def find(path: Path) -> Path | None:
    file = path / WEIGHTS
    return file if file.is_file() and (path / "sae.json").is_file() else None


def read(file: Path) -> Opened:
    directory = file.parent
    return Opened(sae=native.load(directory), manifest=native.read_manifest(directory), format_name=NAME)
