"""Llamascopium (formerly Language-Model-SAEs): `config.json` and `sae_weights.safetensors`, unshifted like ours."""

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.formats.durable import write_text
from sae_train.formats.folding import has_unit_rows, has_zero_rows, native_sae
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

NAME = "llamascopium"
HOLDS = "every SAE"
WEIGHTS, HEADER = "sae_weights.safetensors", "config.json"
THRESHOLD = "activation_function.log_jumprelu_threshold"
NORMS = "dataset_average_activation_norm."
"""Prefix of the tensors with the mean norm at each hook."""
DEFAULT_K = 50
"""What its loader takes where the header has no top_k."""


def refusal(sae: SparseAutoencoder) -> str | None:
    return refusal_of_k(sae)


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    return None


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    tensors: dict[str, Tensor] = {"W_E": sae.W_enc, "b_E": sae.b_enc, "W_D": sae.W_dec, "b_D": sae.b_dec}
    header = {
        "sae_type": "sae",
        "hook_point_in": hook_name(origin),
        "hook_point_out": hook_name(origin),
        "d_model": sae.d_model,
        "expansion_factor": _expansion(sae.d_model, sae.n_features),
        "use_decoder_bias": True,
        "act_fn": "topk" if sae.inference == "topk" else "jumprelu",
        "top_k": min(max(1, round(sae.k)), sae.n_features),
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
    }
    if sae.inference == "threshold":
        tensors[THRESHOLD] = sae.threshold.double().log().float()  # 0 gives -inf, +inf stays
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    write_text(directory / HEADER, json.dumps(header, indent=2) + "\n")


def _expansion(d_model: int, n_features: int) -> float:
    """Return the ratio of widths such that its product with `d_model`, cut to a whole number, is `n_features`."""
    ratio = n_features / d_model
    return ratio if int(d_model * ratio) == n_features else math.nextafter(ratio, math.inf)


def find(path: Path) -> Path | None:
    file = path / WEIGHTS if path.is_dir() else path
    is_there = file.name == WEIGHTS and file.is_file() and (file.parent / HEADER).is_file()
    return file if is_there and not (file.parent / "cfg.json").is_file() else None


def read(file: Path) -> Opened:
    path = file.parent / HEADER
    header, tensors = read_json(path), read_safetensors(file)
    choice(path, {"sae_type": "sae"} | header, "sae_type", ("sae",))
    rule = choice(path, {"act_fn": "relu"} | header, "act_fn", ("relu", "jumprelu", "topk"))
    if flag(path, header, "use_glu_encoder", default=False):
        raise CheckpointError(f"{path}: use_glu_encoder=true: its encoder has a second factor, which our form has not.")
    needed = ["W_E", "b_E", "W_D"]
    needed += ["b_D"] if flag(path, header, "use_decoder_bias", default=True) else []
    needed += [THRESHOLD] if rule == "jumprelu" else []
    check_names(file, tensors, needed, optional=[name for name in tensors if name.startswith(NORMS)])
    D, F = matrix_sizes(file, tensors, "W_E")
    shapes = {"W_E": (D, F), "b_E": (F,), "W_D": (F, D), "b_D": (D,), THRESHOLD: (F,)}
    check_shapes(file, tensors, {name: shapes[name] for name in needed})
    _check_sizes(path, header, D=D, F=F)
    assumed, k = precision_note({name: tensors[name] for name in needed}), 0.0
    if rule == "topk":
        if "top_k" not in header:
            assumed += (f"top_k={DEFAULT_K}, because the header has none; Llamascopium takes the same.",)
        k = float(whole_number(path, {"top_k": DEFAULT_K} | header, "top_k"))
    W_enc, b_enc, W_dec = tensors["W_E"], tensors["b_E"], tensors["W_D"]
    b_dec = tensors.get("b_D", torch.zeros(D))
    factor = _factor(path, header, tensors, D)
    if factor != 1:
        W_enc, W_dec, b_dec = W_enc.double() * factor, W_dec.double() / factor, b_dec.double() / factor
    by_norm = flag(path, header, "sparsity_include_decoder_norm", default=True)
    if by_norm and has_zero_rows(W_dec):
        raise CheckpointError(f"{file}: W_D has rows of zeros, by whose norm Llamascopium divides: its codes are NaN. "
                              "Remove these features.")  # fmt: skip
    threshold = None if rule == "topk" else torch.zeros_like(b_enc)
    if rule == "jumprelu":
        threshold = tensors[THRESHOLD].double().exp()
        if by_norm and not has_unit_rows(W_dec):  # compared with pre-activations times the norms of the stored rows
            threshold = threshold / tensors["W_D"].double().norm(dim=1)
    folds = by_norm or rule != "topk"
    sae = native_sae(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold, k=k,
                     shifts_input=False, folds_rows=folds)  # fmt: skip
    manifest = manifest_of(sae, source=ActivationSource(), site=site_of_hook(header.get("hook_point_in")))
    return Opened(sae=sae, manifest=manifest, format_name=NAME, assumed=assumed)


def _check_sizes(path: Path, header: Mapping[str, Any], *, D: int, F: int) -> None:
    read, written = header.get("hook_point_in"), header.get("hook_point_out")
    if read != written:
        raise CheckpointError(f"{path}: hook_point_in={short(read)}, hook_point_out={short(written)}: a transcoder. "
                              "This program opens autoencoders alone.")  # fmt: skip
    if "d_model" in header and whole_number(path, header, "d_model") != D:
        raise CheckpointError(f"{path}: d_model={header['d_model']}, and the tensors have {D}. Correct the header.")
    ratio = header.get("expansion_factor")
    if isinstance(ratio, int | float) and not F - 1 <= ratio * D <= F + 1:
        raise CheckpointError(f"{path}: expansion_factor={short(ratio)}, and the tensors have {F} features of {D}. "
                              "Correct the header.")  # fmt: skip


def _factor(path: Path, header: dict[str, Any], tensors: Mapping[str, Tensor], D: int) -> float:
    """Return the factor by which activations are scaled before the encoder."""
    how = choice(path, {"norm_activation": "dataset-wise"} | header, "norm_activation", ("inference", "dataset-wise"))
    if how == "inference":  # its files hold norms too, which are uninitialised memory
        return 1.0
    norm = tensors.get(f"{NORMS}{header.get('hook_point_in')}")
    if norm is None or norm.numel() != 1 or not math.isfinite(norm.item()) or norm.item() <= 0:
        raise CheckpointError(f"{path}: norm_activation='dataset-wise', and the weights hold no usable mean norm "
                              f"({NORMS}HOOK). Save it in Llamascopium with "
                              "norm_activation='inference'.")  # fmt: skip
    return math.sqrt(D) / float(norm.item())
