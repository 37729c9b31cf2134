"""Our own format: `sae.safetensors` and `sae.json`, as a run leaves them in `saes/NAME/`.

Tensors, all fp32 and in raw activation units: `W_enc` [d_model, n_features], `b_enc` [n_features],
`W_dec` [n_features, d_model] with unit rows, `b_dec` [d_model], `threshold` [n_features]. They are written as they come
from the ranks, so that no rank ever holds more than its own features and a piece of another's.
"""

import json
import math
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.formats.durable import explained, sync_directory, write_text
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.sae.autoencoder import SparseAutoencoder

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
FORMAT_VERSION = 1
PIECE_BYTES = 16 * 2**20
"""About as many bytes of a file are held at a time, beside the shard."""


def save(
    sae: SparseAutoencoder,
    directory: Path,
    *,
    facts: dict[str, Any],
    n_features: int,
    ranks: Ranks,
    phases: Phases = SILENT,
) -> None:
    """Write an autoencoder whose features the ranks of a row share, and what is known of it. Collective.

    The first rank writes; the JSON file comes last, so a directory with it is whole.

    Args:
        sae: this rank's features, and the whole `b_dec`.
        facts: JSON values for sae.json beside the rule (site, model, tokens, dataset, figures ...).
        n_features: of the whole dictionary.
        ranks: the grid.
        phases: told of each piece that is written.

    Raises:
        CheckpointError: the directory cannot be written; on every rank.
    """
    pieces = _reported(_pieces(sae, n_features=n_features, ranks=ranks), phases)
    problem: CheckpointError | None = None
    if ranks.is_first:
        rule = {
            "format_version": FORMAT_VERSION,
            "inference": sae.inference,
            "k": sae.k,
            "d_model": sae.d_model,
            "n_features": n_features,
        }
        try:
            _write(directory, _header(sae.d_model, n_features), pieces)
            write_text(directory / "sae.json", json.dumps(rule | facts, indent=2) + "\n")
        except CheckpointError as error:
            problem = error
    deque(pieces, maxlen=0)  # what nobody writes still has to be handed round
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
    """Return what a safetensors file begins with: the length of a JSON text, and the text, padded to 8 bytes."""
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
    """Put `sae.safetensors` into a directory durably and in one move."""
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
    """Yield the rows of a tensor that is spread over ranks by its first dimension."""
    own = own.detach().float()
    step = max(1, PIECE_BYTES // (4 * math.prod(own.shape[1:])))
    for column, (low, high) in enumerate(row.slices(n_features)):
        for first in range(0, high - low, step):
            n_rows = min(step, high - low - first)
            mine = own[first : first + n_rows] if column == row.rank else own.new_empty(n_rows, *own.shape[1:])
            yield row.broadcast(mine, column)


def load(path: str | Path, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """Load an exported SAE.

    Args:
        path: a run's directory (`runs/NAME`), or a directory with `sae.safetensors` and `sae.json`.
        device: where its tensors go.

    Returns:
        The SAE in eval mode, fp32, on raw activations. Its `config` holds sae.json.

    Raises:
        CheckpointError: nothing whole is there, or a run holds several SAEs.
    """
    directory = find(Path(path))
    file, notes = directory / "sae.safetensors", directory / "sae.json"
    try:
        config = json.loads(notes.read_text(encoding="utf-8"))
        tensors = load_file(str(file), device=str(device))
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: not JSON, not UTF-8
        raise CheckpointError(
            f"{directory}: not a readable SAE: {error}. Export it again, or give another path."
        ) from error
    _check(directory, config, tensors)
    sae = SparseAutoencoder(
        **{name: tensors[name] for name in TENSORS},
        k=float(config["k"]),
        inference=str(config["inference"]),
        config=config,
    )
    return sae.eval()


def find(path: Path) -> Path:
    """Return the one directory under `path` that holds an exported SAE."""
    if (path / "sae.json").is_file():
        return path
    found = sorted(notes.parent for notes in path.glob("saes/*/sae.json"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(repr(str(directory)) for directory in found[:8])
        raise CheckpointError(f"{path}: holds {len(found)} SAEs. Give one of them: {names}.")
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory. Give a run's directory or one with sae.safetensors.")
    raise CheckpointError(f"{path}: holds no exported SAE (saes/NAME/sae.json). A run writes it when it finishes.")


def _check(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Refuse files whose tensors are missing, misshapen, or contradict their notes."""
    missing = [name for name in TENSORS if name not in tensors] + [
        key for key in ("k", "inference") if key not in config
    ]
    if missing:
        raise CheckpointError(f"{directory}: lacks {', '.join(missing)}; this is not a sae-train export.")
    d_model, n_features = tensors["W_enc"].shape if tensors["W_enc"].dim() == 2 else (-1, -1)
    shapes = _shapes(d_model, n_features)
    wrong = [f"{name} {list(tensors[name].shape)}" for name in TENSORS if tuple(tensors[name].shape) != shapes[name]]
    if wrong:
        raise CheckpointError(f"{directory}: shapes do not fit together: {', '.join(wrong)}.")
    if config["inference"] not in ("threshold", "topk"):
        raise CheckpointError(f"{directory}: inference={config['inference']!r}: not a rule this version knows.")
    if not isinstance(config["k"], int | float) or not math.isfinite(config["k"]):
        raise CheckpointError(f"{directory}: k={config['k']!r}: must be a finite number.")
