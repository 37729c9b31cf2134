"""Qwen Scope: `layerL.sae.pt` below `SAE-Res-MODEL-W32K-L0_50/`, a dictionary of tensors.

k stands in the folder's name alone.
"""

import re
from pathlib import Path, PurePosixPath

import torch

from sae_train.errors import CheckpointError
from sae_train.formats.folding import native_sae
from sae_train.formats.foreign import Opened, Origin, manifest_of, refusal_of_k
from sae_train.formats.gemma_scope import last_match
from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.formats.reading import check_names, check_shapes, matrix_sizes, precision_note, read_pickle
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "qwen_scope"
HOLDS = "SAEs that keep the k largest of a token (inference: topk)"
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
SITES = {"residual": "Res", "mlp": "MLP", "attention": "Attn"}
"""Words in the folder's name. The published suites have Res alone."""


def refusal(sae: SparseAutoencoder) -> str | None:
    return (
        refusal_of_k(sae)
        if sae.inference == "topk"
        else "the SAE has thresholds, and the format keeps the k largest of a token"
    )


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    model = re.sub(r"[^\w.-]", "_", origin.model.rstrip("/").rpartition("/")[2]) or "model"
    k = min(round(manifest.k), manifest.n_features)
    F = manifest.n_features
    width = f"{F // 1024}K" if F % 1024 == 0 else f"{F}"  # 64K for 65536; SAELens takes the width from it
    return PurePosixPath(f"SAE-{SITES[origin.site]}-{model}-W{width}-L0_{k}")


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    tensors = {"W_enc": sae.W_enc.t(), "W_dec": sae.W_dec.t(), "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    file = directory / f"layer{origin.layer}.sae.pt"
    torch.save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file)


def find(path: Path) -> Path | None:
    files = sorted(path.glob("layer*.sae.pt")) if path.is_dir() else [path]
    return files[0] if len(files) == 1 and files[0].name.endswith(".sae.pt") and files[0].is_file() else None


def read(file: Path) -> Opened:
    name = file.absolute().parent.as_posix()
    found = last_match(r"L0_(\d{1,9})(?!\d)", name)
    if found is None or int(found[1]) < 1:
        raise CheckpointError(f"{file}: its k stands in the name of its folder, such as SAE-Res-MODEL-W32K-L0_50, and "
                              f"{name} has none. Rename the folder.")  # fmt: skip
    tensors = read_pickle(file)
    check_names(file, tensors, TENSORS)
    F, D = matrix_sizes(file, tensors, "W_enc")
    check_shapes(file, tensors, {"W_enc": (F, D), "W_dec": (D, F), "b_enc": (F,), "b_dec": (D,)})
    sae = native_sae(W_enc=tensors["W_enc"].t(), b_enc=tensors["b_enc"], W_dec=tensors["W_dec"].t(),
                     b_dec=tensors["b_dec"], k=float(found[1]), shifts_input=False, folds_rows=False)  # fmt: skip
    layer = re.fullmatch(r"layer(\d{1,9})\.sae\.pt", file.name)
    word = last_match(rf"SAE-({'|'.join(SITES.values())})-", name)
    kind = next((site for site, own in SITES.items() if word and own == word[1]), None)
    site = f"{kind}{layer[1]}" if layer and kind else None
    manifest = manifest_of(sae, source=ActivationSource(), site=site, sparsifier="topk")
    assumed = (f"k={found[1]}, from the name of its folder.", *precision_note(tensors))
    return Opened(sae=sae, manifest=manifest, format_name=NAME, assumed=assumed)
