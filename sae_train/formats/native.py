"""Our own format: `sae.safetensors` and `sae.json`, as a run leaves them in `saes/NAME/`.

Tensors, all fp32 and in raw activation units: `W_enc` [d_model, n_features], `b_enc` [n_features],
`W_dec` [n_features, d_model] with unit rows, `b_dec` [d_model], `threshold` [n_features].
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sae_train.errors import CheckpointError
from sae_train.formats.durable import explained, sync_directory, sync_file, write_text
from sae_train.sae.autoencoder import SparseAutoencoder

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
FORMAT_VERSION = 1


def save(sae: SparseAutoencoder, directory: Path, *, facts: dict[str, Any]) -> None:
    """Write `sae` and what is known of it; the JSON file comes last, so a directory with it is whole.

    Args:
        facts: JSON values for sae.json beside the rule (site, model, tokens, dataset, figures ...).

    Raises:
        CheckpointError: the directory cannot be written.
    """
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / ".sae.safetensors.partial"
        try:
            tensors = {name: getattr(sae, name).detach().cpu().contiguous() for name in TENSORS}
            save_file(tensors, str(partial), metadata={"format": "sae-train"})
            sync_file(partial)
            partial.replace(directory / "sae.safetensors")
        except SafetensorError as error:
            raise CheckpointError(
                f"{directory}: cannot be written: {error}. Free space there, or choose runs=DIR."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        sync_directory(directory)
    rule = {
        "format_version": FORMAT_VERSION,
        "inference": sae.inference,
        "k": sae.k,
        "d_model": sae.d_model,
        "n_features": sae.n_features,
    }
    write_text(directory / "sae.json", json.dumps(rule | facts, indent=2) + "\n")


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
    shapes = {
        "W_enc": (d_model, n_features),
        "b_enc": (n_features,),
        "W_dec": (n_features, d_model),
        "b_dec": (d_model,),
        "threshold": (n_features,),
    }
    wrong = [f"{name} {list(tensors[name].shape)}" for name in TENSORS if tuple(tensors[name].shape) != shapes[name]]
    if wrong:
        raise CheckpointError(f"{directory}: shapes do not fit together: {', '.join(wrong)}.")
    if config["inference"] not in ("threshold", "topk"):
        raise CheckpointError(f"{directory}: inference={config['inference']!r}: not a rule this version knows.")
    if not isinstance(config["k"], int | float) or not math.isfinite(config["k"]):
        raise CheckpointError(f"{directory}: k={config['k']!r}: must be a finite number.")
