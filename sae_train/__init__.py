"""Sparse autoencoders on the activations of language models: train from the command line, load from here.

`sae_train.load(path)` reads an exported SAE. Importing the package costs nothing: torch is imported with the
first of its names that is used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_train.formats.load import load
    from sae_train.sae.autoencoder import SparseAutoencoder
    from sae_train.sae.code import SparseCode

    __version__: str

__all__ = ["SparseAutoencoder", "SparseCode", "__version__", "load"]

_HOMES = {
    "load": "sae_train.formats.load",
    "SparseAutoencoder": "sae_train.sae.autoencoder",
    "SparseCode": "sae_train.sae.code",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("sae-train")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
