"""OpenAI's sparse_autoencoder: one `.pt` file. Read only: it has no thresholds, and its TopK normalises each token."""

from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, zeros_like

from sae_train.errors import CheckpointError
from sae_train.formats.folding import native_sae
from sae_train.formats.foreign import Opened, Origin, manifest_of
from sae_train.formats.manifest import ActivationSource, SaeManifest
from sae_train.formats.reading import check_names, check_shapes, matrix_sizes, precision_note, read_pickle, short
from sae_train.sae.autoencoder import SparseAutoencoder

NAME = "openai"
HOLDS = "none of ours; it is read only"
TIED = "decoder.linear.weight"
"""Name of the decoder where it is the encoder's own weight, [n_features, d_model]."""
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
SETTINGS = ("activation", "activation_state_dict", "activation.k", "activation.postact_fn")


def refusal(sae: SparseAutoencoder) -> str | None:
    if sae.inference == "topk":
        return "OpenAI's TopK normalises each token first"
    return "the format has no thresholds"


def folder(manifest: SaeManifest, origin: Origin) -> PurePosixPath | None:
    return None


def write(sae: SparseAutoencoder, manifest: SaeManifest, origin: Origin, directory: Path) -> None:
    raise AssertionError("refused for every SAE")


def find(path: Path) -> Path | None:
    if path.is_dir():
        files = [file for file in path.glob("*.pt") if not _is_others(file) and file.is_file()]
        return files[0] if len(files) == 1 else None
    return path if path.suffix == ".pt" and path.is_file() and not _is_others(path) else None


def _is_others(file: Path) -> bool:
    """Return whether another format has files of this name."""
    return file.name == "ae.pt" or file.name.endswith(".sae.pt")


def read(file: Path) -> Opened:
    tensors = read_pickle(file)
    activation = tensors.get("activation")
    if activation != "ReLU":
        raise CheckpointError(f"{file}: activation={short(activation)}: only 'ReLU' has our form. OpenAI's TopK "
                              "normalises each token by its mean and norm first.")  # fmt: skip
    decoder = TIED if TIED in tensors else "decoder.weight"
    needed = ("pre_bias", "latent_bias", "encoder.weight", decoder)
    check_names(file, tensors, needed, optional=(*STATISTICS, *SETTINGS))
    F, D = matrix_sizes(file, tensors, "encoder.weight")
    shapes = {"encoder.weight": (F, D), "latent_bias": (F,), "pre_bias": (D,)}
    shapes[decoder] = (F, D) if decoder == TIED else (D, F)
    check_shapes(file, tensors, shapes)
    weights: dict[str, Any] = {name: tensors[name] for name in needed}
    bias: Tensor = weights["latent_bias"]
    W_dec = weights[decoder] if decoder == TIED else weights[decoder].t()
    sae = native_sae(W_enc=weights["encoder.weight"].t(), b_enc=bias, W_dec=W_dec, b_dec=weights["pre_bias"],
                     threshold=zeros_like(bias), k=0.0, shifts_input=True, folds_rows=True)  # fmt: skip
    manifest = manifest_of(sae, source=ActivationSource(), sparsifier="relu")
    return Opened(sae=sae, manifest=manifest, format_name=NAME, assumed=precision_note(weights))
