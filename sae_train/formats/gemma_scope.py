"""Gemma Scope: `params.npz` below `SITE/layer_L/width_W/average_l0_N/`. The tensors are ours, bit for bit."""

import re
from pathlib import Path, PurePosixPath

import numpy as np

from sae_train.formats.folding import native_sae
from sae_train.formats.foreign import SITES, Opened, Origin, manifest_of
from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.formats.reading import check_shapes, matrix_sizes, precision_note, read_npz
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "gemma_scope"
HOLDS = "SAEs with thresholds (inference: threshold)"
WEIGHTS = "params.npz"
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def refusal(sae: SparseAutoencoder) -> str | None:
    return "the SAE keeps the k largest of a token, and the format has thresholds" if sae.inference == "topk" else None


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    l0 = round(manifest.figures.get("l0", manifest.k))
    width = width_word(manifest.n_features)
    return PurePosixPath(origin.site, f"layer_{origin.layer}", f"width_{width}", f"average_l0_{l0}")


def width_word(n_features: int) -> str:
    """Return a width as Gemma Scope's folders write it: 16k for 16384, 65k for 65536, 1m for 1048576.

    These are decimal thousands, and SAELens takes the width from them. A width that is no multiple of 1024 is written
    out.
    """
    for binary, decimal, letter in ((2**20, 10**6, "m"), (2**10, 10**3, "k")):
        if n_features % binary == 0:
            return f"{n_features // decimal}{letter}"
    return str(n_features)


def last_match(pattern: str, folders: str) -> re.Match[str] | None:
    """Return the last match in a path. Folders further up may have any name."""
    return next(reversed(list(re.finditer(pattern, folders))), None)


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    np.savez(directory / WEIGHTS, **{name: getattr(sae, name).detach().numpy() for name in TENSORS})


def find(path: Path) -> Path | None:
    file = path / WEIGHTS if path.is_dir() else path
    return file if file.suffix == ".npz" and file.is_file() else None


def read(file: Path) -> Opened:
    tensors = read_npz(file, TENSORS)
    D, F = matrix_sizes(file, tensors, "W_enc")
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    check_shapes(file, tensors, shapes)
    folders = file.absolute().parent.as_posix()
    l0 = last_match(r"average_l0_(\d{1,9})(?!\d)", folders)
    layer = last_match(rf"/({'|'.join(SITES)}|[^/]*)/layer_(\d{{1,9}})(?!\d)", folders)
    assumed = precision_note(tensors)
    if l0:
        assumed += (f"k={l0[1]}, from the name of its folder.",)
    sae = native_sae(**tensors, k=float(l0[1]) if l0 else 0.0, shifts_input=False, folds_rows=True)
    site = f"{layer[1]}{layer[2]}" if layer and layer[1] in SITES else None
    return Opened(sae=sae, manifest=manifest_of(sae, source=ActivationSource(), site=site), format_name=NAME,
                  assumed=assumed)  # fmt: skip
