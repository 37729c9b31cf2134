"""SAELens: `cfg.json` and `sae_weights.safetensors`, read by `SAE.load_from_disk` and `SAE.from_pretrained`.

Written for the format of sae-lens 6. `apply_b_dec_to_input` is false, so the tensors are ours, bit for bit.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.formats.durable import write_text
from sae_train.formats.folding import gated_encoder, has_unit_rows, has_zero_rows, native_sae
from sae_train.formats.foreign import Opened, Origin, manifest_of, refusal_of_k
from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.formats.reading import (
    check_names,
    check_shapes,
    choice,
    flag,
    matrix_sizes,
    precision_note,
    read_json,
    read_safetensors,
    short,
    whole_number,
)
from sae_train.formats.transformer_lens import hook_name, site_of_hook
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "saelens"
HOLDS = "every SAE"
VERSION = "6.54.12"
"""Version of sae-lens whose format this is. Files without one are converted by older rules, which drop the metadata."""
WEIGHTS, HEADER = "sae_weights.safetensors", "cfg.json"
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
NO_NORMALISATION = (None, "none", False)
DEFAULT_K = 100
"""What its loader takes where the header has no k."""
OLD_NAMES = {"activation_fn_str": "activation_fn", "hook_point": "hook_name"}
"""Keys that versions before 6 wrote, and the later names."""


def refusal(sae: SparseAutoencoder) -> str | None:
    return refusal_of_k(sae)


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    return None


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    tensors: dict[str, Tensor] = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    own: dict[str, Any] = {"architecture": "jumprelu"}
    if sae.inference == "topk":
        # unit rows make the rescaling exact, and SAELens folds norms and draws dashboards with it only
        own = {
            "architecture": "topk",
            "k": min(round(sae.k), sae.n_features),
            "rescale_acts_by_decoder_norm": has_unit_rows(sae.W_dec) and not has_zero_rows(sae.W_dec),
        }
    else:
        tensors["threshold"] = sae.threshold
    header = own | {
        "d_in": sae.d_model,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if origin.site == "attention" else "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": origin.model,
            "hook_name": hook_name(origin),
            "hook_head_index": None,
            "prepend_bos": origin.prepends_bos,
            "context_size": origin.context_length,
            # TransformerLens would else take the mean off the residual stream of models with LayerNorm
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
        },
    }
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    write_text(directory / HEADER, json.dumps(header, indent=2) + "\n")


def find(path: Path) -> Path | None:
    file = path / WEIGHTS if path.is_dir() else path
    return file if file.name == WEIGHTS and file.is_file() and (file.parent / HEADER).is_file() else None


def read(file: Path) -> Opened:
    path = file.parent / HEADER
    header, tensors = _of_version_6(path, read_json(path)), read_safetensors(file)
    architecture = choice(path, header, "architecture", ARCHITECTURES)
    normalisation = header.get("normalize_activations")
    if normalisation not in NO_NORMALISATION:
        raise CheckpointError(
            f"{path}: normalize_activations={short(normalisation)}: each token or data set would be normalised "
            "first, which is not among the weights. Fold it in SAELens, or give another SAE."
        )
    k, own = 0.0, _own_tensors(architecture)
    check_names(file, tensors, ("W_enc", "W_dec", "b_dec", *own), optional=("scaling_factor",))
    D, F = matrix_sizes(file, tensors, "W_enc")
    check_shapes(file, tensors, {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,), **dict.fromkeys(own, (F,))})
    if "scaling_factor" in tensors and not tensors["scaling_factor"].eq(1).all():
        raise CheckpointError(f"{file}: holds a scaling_factor other than 1, which SAELens itself does not load.")
    for key, size in (("d_in", D), ("d_sae", F)):
        if key in header and whole_number(path, header, key) != size:
            raise CheckpointError(f"{path}: {key}={header[key]}, and the tensors have {size}. Correct the header.")
    folds_rows = True
    if architecture == "topk":
        k = float(whole_number(path, {"k": DEFAULT_K} | header, "k"))
        folds_rows = flag(path, header, "rescale_acts_by_decoder_norm", default=False)
        if folds_rows and has_zero_rows(tensors["W_dec"]):
            raise CheckpointError(f"{file}: W_dec has rows of zeros, by whose norm SAELens divides: its codes are NaN. "
                                  "Remove these features.")  # fmt: skip
    W_enc, b_enc, threshold = _encoder(architecture, tensors)
    shifts = flag(path, header, "apply_b_dec_to_input", default=True)
    sae = native_sae(W_enc=W_enc, b_enc=b_enc, W_dec=tensors["W_dec"], b_dec=tensors["b_dec"], threshold=threshold,
                     k=k, shifts_input=shifts, folds_rows=folds_rows)  # fmt: skip
    assumed = precision_note(tensors)
    if architecture == "topk" and "k" not in header:
        assumed += (f"k={DEFAULT_K}, because the header has none; SAELens takes the same.",)
    if "apply_b_dec_to_input" not in header:
        assumed += ("apply_b_dec_to_input is not given; SAELens takes it as true.",)
    metadata = header["metadata"]
    hook = metadata.get("hook_name")
    site = site_of_hook(hook)
    if site is None and hook is not None:
        assumed += (f"hook_name={short(hook)} is no site that this program names.",)
    model = metadata.get("model_name")
    source = ActivationSource(
        model=model if isinstance(model, str) else None,
        context_length=metadata.get("context_size") if isinstance(metadata.get("context_size"), int) else None,
        prepends_bos=metadata.get("prepend_bos") if isinstance(metadata.get("prepend_bos"), bool) else None,
    )
    return Opened(sae=sae, manifest=manifest_of(sae, source=source, site=site), format_name=NAME, assumed=assumed)


def _of_version_6(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Return a header with the keys of version 6. Earlier versions have no `metadata`, and name k elsewhere."""
    if isinstance(header.get("metadata"), dict):
        return header
    header = {OLD_NAMES.get(key, key): value for key, value in header.items()}
    header = {"architecture": "standard", "activation_fn": "relu"} | header | {"metadata": header}
    arguments = header.get("activation_fn_kwargs")
    if "topk" in (header["architecture"], header["activation_fn"]):
        k = {"k": arguments["k"]} if isinstance(arguments, dict) and "k" in arguments else {}
        return header | {"architecture": "topk"} | k
    choice(path, header, "activation_fn", ("relu",))
    return header


def _own_tensors(architecture: str) -> tuple[str, ...]:
    """Return the names of an architecture's tensors [n_features]."""
    if architecture == "gated":
        return ("b_gate", "r_mag", "b_mag")
    return ("b_enc", "threshold") if architecture == "jumprelu" else ("b_enc",)


def _encoder(architecture: str, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return W_enc, b_enc and the thresholds of an architecture; no thresholds where the k largest are kept."""
    W_enc = tensors["W_enc"]
    if architecture == "gated":
        b_mag = tensors["b_mag"]
        W_enc, threshold = gated_encoder(W_enc, b_mag=b_mag, b_gate=tensors["b_gate"], r_mag=tensors["r_mag"])
        return W_enc, b_mag, threshold
    if architecture == "topk":
        return W_enc, tensors["b_enc"], None
    return W_enc, tensors["b_enc"], tensors.get("threshold", torch.zeros_like(tensors["b_enc"]))
