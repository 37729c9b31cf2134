"""Gemma Scope 2: `params.safetensors` and `config.json` below `SITE/layer_L_width_W_l0_N/`. The tensors are ours."""

import json
import re
from pathlib import Path, PurePosixPath

from safetensors.torch import save_file

from sae_train.errors import CheckpointError
from sae_train.formats.durable import write_text
from sae_train.formats.folding import native_sae
from sae_train.formats.foreign import Opened, Origin, manifest_of
from sae_train.formats.gemma_scope import width_word
from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.formats.reading import (
    check_names,
    check_shapes,
    choice,
    matrix_sizes,
    number,
    precision_note,
    read_json,
    read_safetensors,
)
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "gemma_scope_2"
HOLDS = "SAEs with thresholds (inference: threshold)"
WEIGHTS, HEADER = "params.safetensors", "config.json"
TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
SITES = {"residual": "resid_post", "mlp": "mlp_out", "attention": "attn_out"}
"""Its folders for each kind of site."""
HOOKS = {"residual": "", "mlp": "post_feedforward_layernorm.", "attention": "self_attn."}
PUBLISHER = "google/"
"""What SAELens puts before the model's name."""


def refusal(sae: SparseAutoencoder) -> str | None:
    return "the SAE keeps the k largest of a token, and the format has thresholds" if sae.inference == "topk" else None


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    l0 = round(manifest.figures.get("l0", manifest.k))
    name = f"layer_{origin.layer}_width_{width_word(manifest.n_features)}_l0_{l0}"
    return PurePosixPath(SITES[origin.site], name)


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    tensors = {name: getattr(sae, name.replace("w_", "W_")).detach().contiguous() for name in TENSORS}
    header = {
        "architecture": "jump_relu",
        "model_name": origin.model.removeprefix(PUBLISHER),
        "hf_hook_point_in": f"model.layers.{origin.layer}.{HOOKS[origin.site]}output",
        "width": sae.n_features,
        "l0": manifest.figures.get("l0", manifest.k),
        "type": "sae",
    }
    save_file(tensors, directory / WEIGHTS)
    write_text(directory / HEADER, json.dumps(header, indent=2) + "\n")


def find(path: Path) -> Path | None:
    file = path / WEIGHTS if path.is_dir() else path
    return file if file.name == WEIGHTS and file.is_file() else None


def read(file: Path) -> Opened:
    tensors, path = read_safetensors(file), file.parent / HEADER
    header = read_json(path) if path.is_file() else {}
    if "architecture" in header:
        choice(path, header, "architecture", ("jump_relu",))
    choice(path, {"type": "sae"} | header, "type", ("sae",))
    skips = [name for name in tensors if "skip" in name]
    if skips:
        raise CheckpointError(f"{file}: holds {skips[0]}, a linear map from its input to its output. This program "
                              "opens autoencoders alone.")  # fmt: skip
    check_names(file, tensors, TENSORS, optional=tensors)  # its own loaders ignore further tensors
    D, F = matrix_sizes(file, tensors, "w_enc")
    shapes = {"w_enc": (D, F), "w_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    check_shapes(file, tensors, shapes)
    assumed, k = precision_note(tensors), number(header, "l0") or 0.0
    sae = native_sae(W_enc=tensors["w_enc"], b_enc=tensors["b_enc"], W_dec=tensors["w_dec"], b_dec=tensors["b_dec"],
                     threshold=tensors["threshold"], k=k, shifts_input=False,
                     folds_rows=True)  # fmt: skip
    name = header.get("model_name")
    source = ActivationSource(model=f"{PUBLISHER}{name}" if isinstance(name, str) else None)
    folders = str(file.absolute().parent)
    layer = re.search(r"layer_(\d{1,9})", folders)
    kinds = [site for site, word in SITES.items() if word in folders]
    site = f"{kinds[0]}{layer[1]}" if layer and len(kinds) == 1 else None
    return Opened(sae=sae, manifest=manifest_of(sae, source=source, site=site), format_name=NAME, assumed=assumed)
