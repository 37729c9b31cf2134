"""Our own format: `sae.safetensors` and `sae.json`, as a run leaves them in `saes/NAME/`.

Tensors, all fp32 and in raw activation units: `W_enc` [d_model, n_features], `b_enc` [n_features],
`W_dec` [n_features, d_model] with unit rows, `b_dec` [d_model], `threshold` [n_features]. The ranks send them in
pieces, so that no rank ever holds more than its own features and a piece of another rank's.
"""

import json
import math
import os
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_train.errors import CheckpointError, suggest
from sae_train.formats.durable import explained, sync_directory, write_text
from sae_train.formats.manifest import SaeManifest
from sae_train.formats.reading import FLOATS, reason_of
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
WEIGHTS = "sae.safetensors"
PIECE_BYTES = 16 * 2**20
"""Bytes of a file that are held at a time besides the shard, about."""


def save(
    sae: SparseAutoencoder,
    directory: Path,
    *,
    manifest: SaeManifest,
    ranks: Ranks,
    phases: Phases = SILENT,
) -> None:
    """Write an SAE whose features the ranks of a row share, and its manifest. Collective.

    The first rank writes. The JSON file comes last, so a directory that holds it is complete.

    Args:
        sae: this rank's features, and the whole `b_dec`.
        manifest: the content of sae.json; its `n_features` is the width of the whole dictionary.
        ranks: the grid.
        phases: receives the progress, in bytes.

    Raises:
        CheckpointError: the directory cannot be written; on every rank.
    """
    stated = (manifest.inference, manifest.k, manifest.d_model)
    assert stated == (sae.inference, sae.k, sae.d_model), "the manifest of another SAE"
    pieces = _reported(_pieces(sae, n_features=manifest.n_features, ranks=ranks), phases)
    problem: CheckpointError | None = None
    if ranks.is_first:
        try:
            _write(directory, _header(manifest.d_model, manifest.n_features), pieces)
            write_text(directory / "sae.json", json.dumps(manifest.as_json(), indent=2) + "\n")
        except CheckpointError as error:
            problem = error
    deque(pieces, maxlen=0)  # after an error the rest is not written, and the other ranks still send it
    ranks.raise_together(problem)


def size_of(d_model: int, n_features: int) -> int:
    """Return the bytes of the tensors that `save` writes."""
    return sum(4 * math.prod(shape) for shape in _shapes(d_model, n_features).values())


def _reported(pieces: Iterator[Tensor], phases: Phases) -> Iterator[Tensor]:
    for piece in pieces:
        phases.advance(piece.nbytes)
        yield piece


def _shapes(d_model: int, n_features: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors' shapes in the order of the file."""
    return {
        "W_enc": (d_model, n_features),
        "b_enc": (n_features,),
        "W_dec": (n_features, d_model),
        "b_dec": (d_model,),
        "threshold": (n_features,),
    }


def _header(d_model: int, n_features: int) -> bytes:
    """Return the header of a safetensors file: the length of a JSON text, and the text, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "sae-train"}}
    offset = 0
    for name, shape in _shapes(d_model, n_features).items():
        end = offset + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(directory: Path, header: bytes, pieces: Iterator[Tensor]) -> None:
    """Write `sae.safetensors` durably under a temporary name, then rename it."""
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / ".sae.safetensors.partial"
        try:
            with partial.open("wb") as file:
                file.write(header)
                for piece in pieces:
                    file.write(piece.cpu().contiguous().numpy().data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(directory / "sae.safetensors")
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(directory)


@torch.no_grad()
def _pieces(sae: SparseAutoencoder, *, n_features: int, ranks: Ranks) -> Iterator[Tensor]:
    """Yield all tensors in the order of the file, fp32, in pieces, the same on every rank. Collective."""
    row = ranks.features
    step = max(1, PIECE_BYTES // (4 * n_features))
    for rows in torch.split(sae.W_enc.detach().float(), step):
        yield row.gather_slices(rows.t().contiguous(), n_features).t()
    yield from _shards(sae.b_enc, n_features, row)
    yield from _shards(sae.W_dec, n_features, row)
    yield sae.b_dec.detach().float()
    yield from _shards(sae.threshold, n_features, row)


def _shards(own: Tensor, n_features: int, row: Ranks) -> Iterator[Tensor]:
    """Yield the rows of a tensor that is sharded over ranks by its first dimension. Collective."""
    own = own.detach().float()
    step = max(1, PIECE_BYTES // (4 * math.prod(own.shape[1:])))
    for column, (low, high) in enumerate(row.slices(n_features)):
        for first in range(0, high - low, step):
            n_rows = min(step, high - low - first)
            mine = own[first : first + n_rows] if column == row.rank else own.new_empty(n_rows, *own.shape[1:])
            yield row.broadcast(mine, column)


def load(path: str | Path, name: str | None = None, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """Load an exported SAE.

    Example: `load("runs/suite", "residual2.mutual_choice.k32.f2048.s0")`.

    Args:
        path: a run's directory (`runs/NAME`), or a directory with `sae.safetensors` and `sae.json`.
        name: the SAE of a run with several, as in `saes/NAME/` and suite.json.
        device: the device of its tensors.

    Returns:
        The SAE in eval mode, fp32, on raw activations. Its `config` is the content of sae.json.

    Raises:
        CheckpointError: the directory holds no complete export, holds several and no name is given, or holds none of
            that name. The message lists the names.
    """
    directory = find(Path(path), name)
    config, manifest = _read(directory)
    with _explained(directory):
        tensors = load_file(str(directory / "sae.safetensors"), device=str(device))
    _check(directory, manifest, tensors)
    sae = SparseAutoencoder(
        **{name: tensors[name] for name in TENSORS}, k=manifest.k, inference=manifest.inference, config=config
    )
    return sae.eval()


def read_manifest(path: str | Path, name: str | None = None) -> SaeManifest:
    """Return the manifest of an exported SAE; arguments and errors are those of `load`."""
    return _read(find(Path(path), name))[1]


def _read(directory: Path) -> tuple[dict[str, Any], SaeManifest]:
    """Return the content of sae.json as it stands there, and as a manifest."""
    with _explained(directory):
        config = json.loads((directory / "sae.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"sae.json holds a {type(config).__name__}, not an object with keys")
    try:
        return config, SaeManifest.from_json(config)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {reason_of(error)}.") from error


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Turn errors of reading a file into a message for the user."""
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError) as error:  # not JSON, not UTF-8, nested too deeply
        raise CheckpointError(
            f"{directory}: not a readable SAE: {reason_of(error)}. Export it again, or give another path."
        ) from error


def holds_saes(path: Path) -> bool:
    """Return whether a directory is an exported SAE in our format, or a run's directory."""
    path = path.parent if path.name == WEIGHTS else path
    with explained(path, what="read"):
        return (path / "sae.json").is_file() or (path / "saes").is_dir() or (path / "config.yaml").is_file()


def find(path: Path, name: str | None = None) -> Path:
    """Return the directory of the exported SAE `name` under `path`, or of the only one there."""
    path = path.parent if path.name == WEIGHTS else path
    if (path / "sae.json").is_file():
        if name not in (None, path.name):
            raise CheckpointError(f"{path}: is the SAE {path.name} itself, not {name!r}. Give the run's directory.")
        return path
    found = {notes.parent.name: notes.parent for notes in sorted(path.glob("saes/*/sae.json"))}
    if name in found:
        return found[name]
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory. Give a run's directory or one with sae.safetensors.")
    if not found:
        raise CheckpointError(f"{path}: holds no exported SAE (saes/NAME/sae.json). A run writes it when it finishes.")
    if name is not None:
        raise CheckpointError(f"{path}: holds no SAE {name!r}.{suggest(name, found) or _listed(found)}")
    if len(found) == 1:
        return next(iter(found.values()))
    raise CheckpointError(
        f"{path}: holds {len(found)} SAEs. Give the name of one, as in load(RUN, NAME).{_listed(found)}"
    )


def _listed(names: Collection[str]) -> str:
    """Return names for a message, one a line."""
    return "".join(f"\n  {name}" for name in names)


def _check(directory: Path, manifest: SaeManifest, tensors: dict[str, Tensor]) -> None:
    """Refuse files whose tensors are missing, or do not have the shapes of the manifest."""
    missing = [name for name in TENSORS if name not in tensors]
    if missing:
        raise CheckpointError(f"{directory}: lacks {', '.join(missing)}; this is not a sae-train export.")
    dtypes = {tensors[name].dtype for name in TENSORS}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        found = ", ".join(f"{name} {str(tensors[name].dtype).removeprefix('torch.')}" for name in TENSORS)
        raise CheckpointError(f"{directory}: not floating-point numbers of one kind: {found}. Export it again.")
    shapes = _shapes(manifest.d_model, manifest.n_features)
    wrong = [f"{name} {list(tensors[name].shape)}" for name in TENSORS if tuple(tensors[name].shape) != shapes[name]]
    if wrong:
        raise CheckpointError(
            f"{directory}: shapes do not fit d_model={manifest.d_model} and n_features={manifest.n_features} of "
            f"sae.json: {', '.join(wrong)}. Export it again, or give another path."
        )
