"""Small SAEs in every foreign format, without a record, and changes of their files."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_train.formats.export import Source, export
from sae_train.formats.foreign import Opened
from sae_train.formats.record import FILE
from sae_train.formats.registry import FORMATS
from sae_train.sae.autoencoder import SparseAutoencoder
from tools.random_sae import manifest_of, random_sae

PICKLED = ("dictionary_learning", "qwen_scope", "openai")
"""Formats whose main file torch.save writes."""
NOBODY = 65534
"""A user without privileges."""


def sae_for(name: str) -> SparseAutoencoder:
    sae = random_sae(d_model=7, n_features=12)
    if FORMATS[name].refusal(sae) is not None:
        sae.inference, sae.threshold = "topk", torch.zeros(12)
    return sae


def write(name: str, out: Path) -> Path:
    """Write a small SAE in a format, without a record; return its main file."""
    if name == "openai":
        out.mkdir()
        sae = sae_for("saelens")
        tensors = {"pre_bias": sae.b_dec, "latent_bias": sae.b_enc, "encoder.weight": sae.W_enc.t(),
                   "decoder.weight": sae.W_dec.t()}  # fmt: skip
        plain = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
        torch.save(plain | {"activation": "ReLU"}, out / "sae.pt")
        return out / "sae.pt"
    sae = sae_for(name)
    opened = Opened(sae=sae, manifest=manifest_of(sae, site="residual1"), format_name="ours")
    (done,) = export([Source(name="one", open=lambda: opened, run=None)], FORMATS[name], out)
    (done.directory / FILE).unlink()
    file = FORMATS[name].find(done.directory)
    assert file is not None
    return file


def header_of(file: Path) -> Path | None:
    return next((each for each in file.parent.glob("*.json")), None)


def tensors_in(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return dict(torch.load(file, weights_only=True))


def put(file: Path, tensors: dict[str, Any]) -> None:
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file)
    elif file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(tensors, file)


def matrix(tensors: dict[str, Any]) -> str:
    return next(name for name, each in tensors.items() if isinstance(each, Tensor) and each.ndim == 2)


@contextmanager
def without_privileges() -> Iterator[None]:
    """Let permissions hold for this process, which they do not for root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@contextmanager
def open_folder() -> Iterator[Path]:
    """Give a directory that every user may enter. pytest's are of one user alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
