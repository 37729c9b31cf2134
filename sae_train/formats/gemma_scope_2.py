"""Gemma Scope 2: `params.safetensors` and `config.json` below `SITE/layer_L_width_W_l0_N/`. The tensors are ours."""

import json
from pathlib import Path, PurePosixPath

from safetensors.torch import save_file

from sae_train.errors import CheckpointError
from sae_train.formats.durable import write_text
from sae_train.formats.folding import native_sae
from sae_train.formats.foreign import Opened, Origin, manifest_of
from sae_train.formats.gemma_scope import last_match, width_word
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
    short,
)
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "gemma_scope_2"
HOLDS = "SAEs with thresholds (inference: threshold)"
WEIGHTS, HEADER = "params.safetensors", "config.json"
TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
SITES = {"residual": "resid_post", "mlp": "mlp_out", "attention": "attn_out"}
"""Its folders for each kind of site."""
HOOKS = {"residual": "", "mlp": "post_feedforward_layernorm.", "attention": "self_attn.o_proj."}
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
        "hf_hook_point_in": _hook(manifest, origin),
        "width": sae.n_features,
        "l0": manifest.figures.get("l0", manifest.k),
        "type": "sae",
    }
    save_file(tensors, directory / WEIGHTS)
    write_text(directory / HEADER, json.dumps(header, indent=2) + "\n")


def _hook(manifest: SaeManifest, origin: Origin) -> str:
    """Return the module and its side, as recorded or else as in Gemma 3."""
    if origin.module is not None:
        return f"{origin.module}.{manifest.source.side or 'output'}"
    side = "input" if origin.site == "attention" else "output"
    return f"model.layers.{origin.layer}.{HOOKS[origin.site]}{side}"


def find(path: Path) -> Path | None:
    file = path / WEIGHTS if path.is_dir() else path
    return file if file.name == WEIGHTS and file.is_file() else None


def read(file: Path) -> Opened:
    tensors, path = read_safetensors(file), file.parent / HEADER
    header = read_json(path) if path.is_file() else {}
    if "architecture" in header:
        choice(path, header, "architecture", ("jump_relu",))
    choice(path, {"type": "sae"} | header, "type", ("sae",))
    read, written = header.get("hf_hook_point_in"), header.get("hf_hook_point_out")
    skips = [name for name in tensors if "skip" in name or "affine" in name]
    if skips or header.get("affine_connection") or written not in (None, read):
        what = f"holds {skips[0]}" if skips else f"reads {short(read)} and writes {short(written)}"
        raise CheckpointError(f"{file}: {what}: a transcoder. This program opens autoencoders alone.")
    check_names(file, tensors, TENSORS, optional=tensors)  # its own loaders ignore further tensors
    D, F = matrix_sizes(file, tensors, "w_enc")
    shapes = {"w_enc": (D, F), "w_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    check_shapes(file, tensors, shapes)
    assumed, k = precision_note(tensors), number(header, "l0") or 0.0
    sae = native_sae(W_enc=tensors["w_enc"], b_enc=tensors["b_enc"], W_dec=tensors["w_dec"], b_dec=tensors["b_dec"],
                     threshold=tensors["threshold"], k=k, shifts_input=False,
                     folds_rows=True)  # fmt: skip
    name = header.get("model_name")
    model = f"{PUBLISHER}{name}" if isinstance(name, str) and name.startswith("gemma") else name
    source = ActivationSource(model=model.replace("gemma-v3", "gemma-3") if isinstance(model, str) else None)
    folders = file.absolute().parent.as_posix()
    layer = last_match(r"layer_(\d{1,9})(?!\d)", folders)
    word = last_match("|".join(SITES.values()), folders)
    kinds = {own: site for site, own in SITES.items()}
    site = f"{kinds[word[0]]}{layer[1]}" if layer and word else None
    return Opened(sae=sae, manifest=manifest_of(sae, source=source, site=site), format_name=NAME, assumed=assumed)
