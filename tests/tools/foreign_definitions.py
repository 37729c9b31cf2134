"""How other programs compute codes and reconstructions from their own files: slow numpy, written from their formats.

Nothing here uses our readers. Each function takes the file's tensors (and header) and raw activations x [n, d_model]
in float64, and returns codes [n, n_features] and reconstructions [n, d_model] in the other program's own units.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

Array = np.ndarray[Any, np.dtype[np.float64]]
Codes = tuple[Array, Array]


def kept_largest(pre: Array, k: int) -> Array:
    """Return the k largest entries of each row where they are positive, ties to the lower index; zeros elsewhere."""
    codes = np.zeros_like(pre)
    for row, values in zip(codes, pre, strict=True):
        chosen = sorted(range(len(values)), key=lambda index: (-values[index], index))[:k]
        for index in chosen:
            row[index] = max(0.0, values[index])
    return codes


def jump(pre: Array, threshold: Array | float) -> Array:
    """Return entries that are positive and above their threshold, zeros elsewhere."""
    return np.where((pre > threshold) & (pre > 0), pre, 0.0)


def saelens(directory: Path, x: Array) -> Codes:
    header = json.loads((directory / "cfg.json").read_text())
    w = _wide(load_file(directory / "sae_weights.safetensors"))
    if header.get("apply_b_dec_to_input", True):
        x = x - w["b_dec"]
    product = x @ w["W_enc"]
    norms = np.linalg.norm(w["W_dec"], axis=1)
    match header["architecture"]:
        case "standard":
            codes = np.maximum(product + w["b_enc"], 0)
        case "jumprelu":
            codes = jump(product + w["b_enc"], w["threshold"])
        case "gated":
            is_open = product + w["b_gate"] > 0
            codes = np.where(is_open, np.maximum(product * np.exp(w["r_mag"]) + w["b_mag"], 0), 0)
        case "topk":
            if header.get("rescale_acts_by_decoder_norm", False):
                codes = kept_largest((product + w["b_enc"]) * norms, header["k"])
                return codes, (codes / norms) @ w["W_dec"] + w["b_dec"]
            codes = kept_largest(product + w["b_enc"], header["k"])
    return codes, codes @ w["W_dec"] + w["b_dec"]


def sparsify(directory: Path, x: Array) -> Codes:
    header = json.loads((directory / "cfg.json").read_text())
    w = _wide(load_file(directory / "sae.safetensors"))
    pre = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    codes = kept_largest(pre, header.get("k", 32))
    return codes, codes @ w["W_dec"] + w["b_dec"]


def dictionary_learning(directory: Path, x: Array) -> Codes:
    kind = json.loads((directory / "config.json").read_text())["trainer"]["dict_class"]
    w = _wide(torch.load(directory / "ae.pt", weights_only=True))
    if kind == "JumpReluAutoEncoder":
        codes = jump(x @ w["W_enc"] + w["b_enc"], w["threshold"])
        return codes, codes @ w["W_dec"] + w["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        pre = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
        codes = np.where(pre > w["threshold"], pre, 0)
        return codes, codes @ w["W_dec"] + w["b_dec"]
    shift = {"GatedAutoEncoder": "decoder_bias", "AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}
    bias = w[shift.get(kind, "b_dec")]
    shifted = x if kind == "AutoEncoderNew" else x - bias
    product = shifted @ w["encoder.weight"].T
    if kind == "GatedAutoEncoder":
        is_open = product + w["gate_bias"] > 0
        codes = np.where(is_open, np.maximum(np.exp(w["r_mag"]) * product + w["mag_bias"], 0), 0)
    else:
        pre = np.maximum(product + w["encoder.bias"], 0)
        codes = pre
        if kind == "AutoEncoderTopK":
            codes = kept_largest(pre, int(w["k"]))
        elif kind == "BatchTopKSAE":
            codes = np.where(pre > w["threshold"], pre, 0)
    return codes, codes @ w["decoder.weight"].T + bias


def gemma_scope(directory: Path, x: Array) -> Codes:
    with np.load(directory / "params.npz") as file:
        w = {name: file[name].astype(np.float64) for name in file.files}
    codes = jump(x @ w["W_enc"] + w["b_enc"], w["threshold"])
    return codes, codes @ w["W_dec"] + w["b_dec"]


def gemma_scope_2(directory: Path, x: Array) -> Codes:
    w = _wide(load_file(directory / "params.safetensors"))
    codes = jump(x @ w["w_enc"] + w["b_enc"], w["threshold"])
    return codes, codes @ w["w_dec"] + w["b_dec"]


def qwen_scope(directory: Path, x: Array) -> Codes:
    (file,) = directory.glob("layer*.sae.pt")
    w = _wide(torch.load(file, weights_only=True))
    codes = kept_largest(x @ w["W_enc"].T + w["b_enc"], int(directory.name.rpartition("L0_")[2]))
    return codes, codes @ w["W_dec"].T + w["b_dec"]


def llamascopium(directory: Path, x: Array) -> Codes:
    header = json.loads((directory / "config.json").read_text())
    w = _wide(load_file(directory / "sae_weights.safetensors"))
    norms = np.linalg.norm(w["W_D"], axis=1) if header["sparsity_include_decoder_norm"] else 1.0
    factor = 1.0
    if header["norm_activation"] == "dataset-wise":
        mean_norm = w[f"dataset_average_activation_norm.{header['hook_point_in']}"].item()
        factor = np.sqrt(x.shape[1]) / mean_norm
    pre = (x * factor @ w["W_E"] + w["b_E"]) * norms
    match header["act_fn"]:
        case "relu":
            chosen = np.maximum(pre, 0)
        case "jumprelu":
            chosen = jump(pre, np.exp(w["activation_function.log_jumprelu_threshold"]))
        case "topk":
            chosen = kept_largest(pre, header["top_k"])
    codes = chosen / norms
    return codes, (codes @ w["W_D"] + w["b_D"]) / factor


def openai(directory: Path, x: Array) -> Codes:
    (file,) = directory.glob("*.pt")
    w = _wide(torch.load(file, weights_only=True))
    codes = np.maximum((x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"], 0)
    decoder = w["decoder.linear.weight"] if "decoder.linear.weight" in w else w["decoder.weight"].T
    return codes, codes @ decoder + w["pre_bias"]


DEFINITIONS = {
    each.__name__: each
    for each in (saelens, sparsify, dictionary_learning, gemma_scope, gemma_scope_2, qwen_scope, llamascopium, openai)
}


def _wide(tensors: Mapping[str, Any]) -> dict[str, Array]:
    """Return the tensors of a file as float64."""
    numbers = {name: each for name, each in tensors.items() if hasattr(each, "shape")}
    return {name: np.asarray(each, dtype=np.float64) for name, each in numbers.items()}
