"""Sparse autoencoders on the activations of language models: train from the command line or from here.

`sae_train.train("k=32", ...)` trains in this process, and `sae_train.load(path)` reads an exported SAE. Importing the
package costs nothing: torch is imported with the first of its names that is used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_train.cli.from_python import train
    from sae_train.errors import UserError
    from sae_train.formats.load import load
    from sae_train.sae.autoencoder import SparseAutoencoder
    from sae_train.sae.code import SparseCode
    from sae_train.training.finished_run import Run

    __version__: str

__all__ = ["Run", "SparseAutoencoder", "SparseCode", "UserError", "__version__", "load", "train"]

_HOMES = {
    "load": "sae_train.formats.load",
    "SparseAutoencoder": "sae_train.sae.autoencoder",
    "SparseCode": "sae_train.sae.code",
    "Run": "sae_train.training.finished_run",
    "UserError": "sae_train.errors",
    "train": "sae_train.cli.from_python",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("sae-train")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
