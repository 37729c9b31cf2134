"""The loaders of other programs: one small function for each format, imported when it is called.

This file needs torch, numpy and the standard library alone: `scripts/verify_formats.py` also runs it in environments
that have the other program and not this one.
"""

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, load, zeros


class Opened(NamedTuple):
    """An SAE as another program loaded it."""

    encode: Callable[[Tensor], Tensor]
    """From activations [n, d_model] to dense codes [n, n_features]."""
    decode: Callable[[Tensor], Tensor]
    """From dense codes to reconstructions."""


class Peer(NamedTuple):
    """A program that reads a format. `PEERS` lists them."""

    package: str
    """Its name on PyPI."""
    module: str
    """Its name in an import."""
    load: Callable[[Any, Path], Opened]
    """Opens the directory of one SAE with the program's own loader, given its module."""

    def imported(self) -> Any:
        """Return the module. Whatever error its import raises passes on."""
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels want CUDA tensors; read at its import
        with quiet():
            return import_module(self.module)

    def name(self) -> str:
        """Return the package and its version."""
        try:
            return f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return f"{self.package} of unknown version"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what other programs print and warn off the console."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def saelens(sae_lens: Any, directory: Path) -> Opened:
    return _of_saelens(sae_lens.SAE.load_from_disk(str(directory), device="cpu"))


def _of_saelens(sae: Any) -> Opened:
    if sae.cfg.reshape_activations == "hook_z":  # it takes [..., heads, d_head], and a single head does as well
        return Opened(lambda x_ND: sae.encode(x_ND[:, None]), lambda code_NF: sae.decode(code_NF).flatten(1))
    return Opened(sae.encode, sae.decode)


def gemma_scope(sae_lens: Any, directory: Path) -> Opened:
    with np.load(directory / "params.npz") as arrays:
        d_model, n_features = arrays["W_enc"].shape
    # a repository of this name is of residual sites of width 2304; the true sizes override it
    overrides = {"d_in": d_model, "d_sae": n_features}
    return _hub(sae_lens, directory, "gemma_2_sae_huggingface_loader", "local/gemma-scope-2b-pt-res", overrides)


def gemma_scope_2(sae_lens: Any, directory: Path) -> Opened:
    return _hub(sae_lens, directory, "gemma_3_sae_huggingface_loader", "local/gemma-scope-2-1b-pt", {})


def qwen_scope(sae_lens: Any, directory: Path) -> Opened:
    (file,) = directory.glob("*.sae.pt")
    n_features, d_model = load(file, map_location="cpu", weights_only=True)["W_enc"].shape
    k = int(re.findall(r"L0_(\d+)", directory.name)[-1])
    # SAELens takes thousands of features and its own list of models from the name; the true sizes override both
    overrides = {"d_in": d_model, "d_sae": n_features}
    repo_id = f"local/SAE-Res-Qwen3-1.7B-Base-W1K-L0_{k}"
    return _hub(sae_lens, directory, "qwen_scope_sae_huggingface_loader", repo_id, overrides, name=file.name)


def _hub(sae_lens: Any, directory: Path, loader: str, repo_id: str, overrides: dict[str, Any], name: str | None = None
         ) -> Opened:  # fmt: skip
    """Open an export by a loader of SAELens that downloads. It is given the local files instead."""
    loaders = import_module("sae_lens.loading.pretrained_sae_loaders")
    own = {"hf_hub_download": _local(directory), "get_safetensors_tensor_shapes": _local_shapes(directory)}
    kept = {key: getattr(loaders, key) for key in own}

    def converter(*, cfg_overrides: dict[str, Any], **named: Any) -> Any:
        return getattr(loaders, loader)(**named, cfg_overrides=cfg_overrides | overrides)

    try:
        for key, value in own.items():
            setattr(loaders, key, value)
        sae = sae_lens.SAE.from_pretrained(repo_id, name or "/".join(directory.parts[-4:]), converter=converter)
    finally:
        for key, value in kept.items():
            setattr(loaders, key, value)
    return _of_saelens(sae)


def _local(directory: Path) -> Callable[..., str]:
    def path_of(repo_id: str, filename: str, **_: Any) -> str:
        return str(directory / Path(filename).name)

    return path_of


def _local_shapes(directory: Path) -> Callable[..., dict[str, list[int]]]:
    def shapes_of(repo_id: str, filename: str) -> dict[str, list[int]]:
        with (directory / Path(filename).name).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}

    return shapes_of


def sparsify(module: Any, directory: Path) -> Opened:
    sae = module.SparseCoder.load_from_disk(directory, device="cpu")

    def encode(x_ND: Tensor) -> Tensor:
        value_NK, feature_NK, _ = sae.encode(x_ND)
        return zeros(len(x_ND), sae.num_latents).scatter_(1, feature_NK, value_NK)

    def decode(code_NF: Tensor) -> Tensor:
        value_NK, feature_NK = code_NF.topk(min(sae.cfg.k, code_NF.shape[1]), dim=1)
        decoded: Tensor = sae.decode(value_NK, feature_NK)
        return decoded

    return Opened(encode, decode)


def dictionary_learning(module: Any, directory: Path) -> Opened:
    dictionary, _ = import_module("dictionary_learning.utils").load_dictionary(str(directory), device="cpu")
    return Opened(dictionary.encode, dictionary.decode)


def llamascopium(module: Any, directory: Path) -> Opened:
    sae = module.SparseDictionary.from_pretrained(str(directory))
    return Opened(sae.encode, sae.decode)


PEERS = {
    "saelens": Peer("sae-lens", "sae_lens", saelens),
    "sparsify": Peer("eai-sparsify", "sparsify", sparsify),
    "dictionary_learning": Peer("dictionary-learning", "dictionary_learning", dictionary_learning),
    "gemma_scope": Peer("sae-lens", "sae_lens", gemma_scope),
    "gemma_scope_2": Peer("sae-lens", "sae_lens", gemma_scope_2),
    "qwen_scope": Peer("sae-lens", "sae_lens", qwen_scope),
    "llamascopium": Peer("llamascopium", "llamascopium", llamascopium),
}
"""By format. Nobody publishes a package that reads OpenAI's files."""
