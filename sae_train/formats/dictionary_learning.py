"""dictionary_learning: `ae.pt`, a dictionary of tensors, and `config.json`.

Written are its classes `JumpReluAutoEncoder`, whose tensors are ours bit for bit, and `AutoEncoderTopK`. All of its
classes for SAEs are read.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_train.errors import CheckpointError
from sae_train.formats.durable import write_text
from sae_train.formats.folding import gated_encoder, native_sae, shifted_bias
from sae_train.formats.foreign import Opened, Origin, label_of, manifest_of, refusal_of_k
from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.formats.reading import (
    MOST,
    check_names,
    check_shapes,
    choice,
    is_plain,
    listed,
    matrix_sizes,
    precision_note,
    read_json,
    read_pickle,
    short,
    whole_number,
)
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "dictionary_learning"
HOLDS = "every SAE"
WEIGHTS, HEADER = "ae.pt", "config.json"
SITES = {"residual": "resid_post", "mlp": "mlp_out", "attention": "attn_z"}
"""Words for a site, for a person: its programs take any."""


class Layout(NamedTuple):
    """The tensors of one of its classes."""

    W_enc: str
    b_enc: str
    W_dec: str
    b_dec: str
    vectors: tuple[str, ...] = ()
    """Further tensors [n_features]."""
    numbers: tuple[str, ...] = ()
    """Further tensors that hold one number, or the sizes of groups."""
    shifts_input: bool = True
    """Whether the encoder reads x - b_dec."""
    folds_rows: bool = True


_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
LAYOUTS = {
    "JumpReluAutoEncoder": Layout("W_enc", "b_enc", "W_dec", "b_dec", ("threshold",), shifts_input=False),
    "AutoEncoderTopK": Layout(*_LINEAR, "b_dec", numbers=("k", "threshold"), folds_rows=False),
    "BatchTopKSAE": Layout(*_LINEAR, "b_dec", numbers=("k", "threshold")),
    "MatryoshkaBatchTopKSAE": Layout("W_enc", "b_enc", "W_dec", "b_dec", numbers=("k", "threshold", "group_sizes")),
    "GatedAutoEncoder": Layout("encoder.weight", "mag_bias", "decoder.weight", "decoder_bias", ("gate_bias", "r_mag")),
    "AutoEncoder": Layout(*_LINEAR, "bias"),
    "AutoEncoderNew": Layout(*_LINEAR, "decoder.bias", shifts_input=False),
}
"""By `dict_class`. Names with a dot are matrices of torch's Linear, which are transposed."""


def refusal(sae: SparseAutoencoder) -> str | None:
    return refusal_of_k(sae)


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    return None


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    trainer: dict[str, Any] = {
        "activation_dim": sae.d_model,
        "dict_size": sae.n_features,
        "layer": origin.layer,
        "lm_name": origin.model,
        "submodule_name": f"{SITES[origin.site]}_layer_{origin.layer}",
    }
    if sae.inference == "topk":
        k = min(round(sae.k), sae.n_features)
        trainer = {"dict_class": "AutoEncoderTopK", "trainer_class": "TopKTrainer", "k": k} | trainer
        tensors = {
            "encoder.weight": sae.W_enc.t(),
            "encoder.bias": shifted_bias(sae),
            "decoder.weight": sae.W_dec.t(),
            "b_dec": sae.b_dec,
            "k": torch.tensor(k, dtype=torch.int32),
            "threshold": torch.tensor(-1.0),  # its loader wants it, and -1 turns it off
        }
    else:
        trainer = {"dict_class": "JumpReluAutoEncoder", "trainer_class": "JumpReluTrainer"} | trainer
        tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        tensors["threshold"] = sae.threshold
    torch.save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    header = {"trainer": trainer, "buffer": {"ctx_len": origin.context_length}}
    write_text(directory / HEADER, json.dumps(header, indent=2) + "\n")


def find(path: Path) -> Path | None:
    file = path / WEIGHTS if path.is_dir() else path
    return file if file.name == WEIGHTS and file.is_file() else None


def read(file: Path) -> Opened:
    tensors, path = read_pickle(file), file.parent / HEADER
    assumed = precision_note(tensors)
    header = read_json(path) if os.path.lexists(path) else {}  # a directory of this name is refused
    trainer = header.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    if "dict_class" in trainer:
        name = choice(path, trainer, "dict_class", LAYOUTS)
    else:
        name = _class_of(file, tensors)
        others = [each for each in _with_tensors_of(tensors) if each != name]
        assumed += (f"no {HEADER} names its class; its tensors are those of {name}.",)
        if others:
            assumed += (f"{others[0]} has the same tensors. The threshold decided, which training may set in both.",)
    layout = LAYOUTS[name]
    check_names(file, tensors, (*layout[:4], *layout.vectors, *layout.numbers))
    sae = _native(file, tensors, layout, name)
    if sae.inference == "topk" and "k" in trainer and whole_number(path, trainer, "k") != sae.k:
        raise CheckpointError(f"{path}: k={short(trainer['k'])}, and k={sae.k:g} in {WEIGHTS}. Correct one of them.")
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    model, buffer = trainer.get("lm_name"), header.get("buffer")
    context_length = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    source = ActivationSource(
        model=model if isinstance(model, str) else None,
        context_length=context_length if isinstance(context_length, int) else None,
    )
    site = label_of(submodule, layer, SITES)
    return Opened(sae=sae, manifest=manifest_of(sae, source=source, site=site), format_name=NAME, assumed=assumed)


def _class_of(file: Path, tensors: Mapping[str, Any]) -> str:
    """Return the class that has just these tensors. BatchTopKSAE and AutoEncoderTopK differ by the threshold."""
    found = _with_tensors_of(tensors)
    if not found:
        raise CheckpointError(f"{file}: has the tensors of no class of dictionary_learning: {listed(tensors)}. "
                              f"Classes that it opens: {', '.join(LAYOUTS)}.")  # fmt: skip
    is_off = "BatchTopKSAE" in found and _number(file, tensors, "threshold") < 0
    return "AutoEncoderTopK" if is_off else found[-1]


def _with_tensors_of(tensors: Mapping[str, Any]) -> list[str]:
    """Return the classes that have just these tensors."""
    return [name for name, layout in LAYOUTS.items() if {*layout[:4], *layout.vectors, *layout.numbers} == set(tensors)]


def _native(file: Path, tensors: Mapping[str, Any], layout: Layout, name: str) -> SparseAutoencoder:
    """Return the native form of the tensors of a class."""
    rows, columns = matrix_sizes(file, tensors, layout.W_enc)
    is_linear = "." in layout.W_enc
    F, D = (rows, columns) if is_linear else (columns, rows)
    encoder, decoder = ((F, D), (D, F)) if is_linear else ((D, F), (F, D))
    shapes = {layout.W_enc: encoder, layout.W_dec: decoder, layout.b_enc: (F,), layout.b_dec: (D,)}
    check_shapes(file, tensors, shapes | dict.fromkeys(layout.vectors, (F,)))
    W_enc, W_dec, b_enc = tensors[layout.W_enc], tensors[layout.W_dec], tensors[layout.b_enc]
    if is_linear:
        W_enc, W_dec = W_enc.t(), W_dec.t()
    if "group_sizes" in layout.numbers:
        _check_groups(file, tensors["group_sizes"], F)
    threshold: Tensor | None = torch.zeros_like(b_enc)
    k = _number(file, tensors, "k") if "k" in layout.numbers else 0.0
    if name == "AutoEncoderTopK":
        threshold = None
        if not k.is_integer() or k < 1:
            raise CheckpointError(f"{file}: k={k:g}: must be a whole number of at least 1.")
    elif name == "JumpReluAutoEncoder":
        threshold = tensors["threshold"]
    elif name == "GatedAutoEncoder":
        W_enc, threshold = gated_encoder(W_enc, b_mag=b_enc, b_gate=tensors["gate_bias"], r_mag=tensors["r_mag"])
    elif "threshold" in layout.numbers:  # -1 stands for none, so that the class is a plain ReLU
        threshold = torch.full_like(b_enc, max(0.0, _number(file, tensors, "threshold")))
    return native_sae(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=tensors[layout.b_dec], threshold=threshold, k=k,
                      shifts_input=layout.shifts_input, folds_rows=layout.folds_rows)  # fmt: skip


def _check_groups(file: Path, sizes: Any, F: int) -> None:
    """Refuse groups that leave out features: those would never be active."""
    is_small = isinstance(sizes, Tensor) and sizes.numel() <= F and is_plain(sizes) and not sizes.is_complex()
    if not is_small or sizes.sum().item() != F:
        raise CheckpointError(f"{file}: group_sizes do not sum to the {F} features of its tensors. Give another file.")


def _number(file: Path, tensors: Mapping[str, Any], name: str) -> float:
    """Return the only number of an entry."""
    value = tensors[name]
    if isinstance(value, Tensor) and value.numel() == 1 and is_plain(value) and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MOST <= value <= MOST:
        raise CheckpointError(f"{file}: {name} is not one finite number.")
    return float(value)
