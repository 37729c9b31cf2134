"""sparsify: `cfg.json` and `sae.safetensors`, read by `Sae.load_from_disk`. Its encoder reads x - b_dec."""

import json
import re
from pathlib import Path, PurePosixPath

from safetensors.torch import save_file

from sae_train.errors import CheckpointError
from sae_train.formats.durable import write_text
from sae_train.formats.folding import has_unit_rows, native_sae, shifted_bias
from sae_train.formats.foreign import Opened, Origin, manifest_of, refusal_of_k
from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.formats.reading import (
    check_names,
    check_shapes,
    flag,
    matrix_sizes,
    precision_note,
    read_json,
    read_safetensors,
    short,
    whole_number,
)
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "sparsify"
HOLDS = "SAEs that keep the k largest of a token (inference: topk)"
WEIGHTS, HEADER = "sae.safetensors", "cfg.json"
DEFAULT_K = 32
"""What its loader takes where the header has no k."""
TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def refusal(sae: SparseAutoencoder) -> str | None:
    return (
        refusal_of_k(sae)
        if sae.inference == "topk"
        else "the SAE has thresholds, and sparsify keeps the k largest of a token"
    )


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    return None


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    tensors = {
        "encoder.weight": sae.W_enc.t(),
        "encoder.bias": shifted_bias(sae),
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    header = {
        "activation": "topk",
        "expansion_factor": max(1, sae.n_features // sae.d_model),
        "normalize_decoder": has_unit_rows(sae.W_dec),
        "num_latents": sae.n_features,
        "k": min(round(sae.k), sae.n_features),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_model,
    }
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    write_text(directory / HEADER, json.dumps(header, indent=2) + "\n")


def find(path: Path) -> Path | None:
    file = path / WEIGHTS if path.is_dir() else path
    is_there = file.name == WEIGHTS and file.is_file() and (file.parent / HEADER).is_file()
    return file if is_there and not (file.parent / "sae.json").is_file() else None


def read(file: Path) -> Opened:
    path = file.parent / HEADER
    header, tensors = read_json(path), read_safetensors(file)
    activation = header.get("activation", "topk")
    if activation != "topk":
        raise CheckpointError(f"{path}: activation={short(activation)}: only 'topk' has our form, in which a token's k "
                              "largest features are kept.")  # fmt: skip
    for key, why in (("transcode", "a transcoder, which reads one site and writes another"),
                     ("skip_connection", "it adds a linear map of its input to the reconstruction"),
                     ("signed", "of older releases, whose codes may be negative")):  # fmt: skip
        if flag(path, header, key, default=False):
            raise CheckpointError(f"{path}: {key}={header[key]}: {why}. This program opens autoencoders alone.")
    assumed = precision_note(tensors)
    if "k" not in header:
        assumed += (f"k={DEFAULT_K}, because the header has none; sparsify takes the same.",)
    k = whole_number(path, {"k": DEFAULT_K} | header, "k")
    check_names(file, tensors, TENSORS)
    F, D = matrix_sizes(file, tensors, "encoder.weight")
    check_shapes(file, tensors, {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)})
    for key, found in (("d_in", D), ("num_latents", F)):
        if header.get(key) not in (None, 0) and whole_number(path, header, key) != found:
            raise CheckpointError(f"{path}: {key}={header[key]}, and the tensors have {found}. Correct the header.")
    sae = native_sae(W_enc=tensors["encoder.weight"].t(), b_enc=tensors["encoder.bias"], W_dec=tensors["W_dec"],
                     b_dec=tensors["b_dec"], k=float(k), shifts_input=True, folds_rows=False)  # fmt: skip
    block = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d{1,9})", file.parent.name)
    site = f"residual{block[1]}" if block else None
    if site:
        assumed += (f"site {site}, from the name of its folder.",)
    manifest = manifest_of(sae, source=ActivationSource(), site=site, sparsifier="topk")
    return Opened(sae=sae, manifest=manifest, format_name=NAME, assumed=assumed)
