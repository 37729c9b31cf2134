"""The foreign formats by name: those that `--to` takes, and those that `load` opens."""

from typing import TYPE_CHECKING, cast

from sae_train.errors import CheckpointError, suggest
from sae_train.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llamascopium,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)

if TYPE_CHECKING:
    from sae_train.formats.foreign import Format
    from sae_train.sae.autoencoder import SparseAutoencoder

MODULES = (
    saelens,
    sparsify,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    qwen_scope,
    llamascopium,
    openai,
)
FORMATS = {module.NAME: cast("Format", module) for module in MODULES}


def format_named(name: str) -> "Format":
    """Return a format by its name.

    Raises:
        CheckpointError: there is none of that name.
    """
    if name not in FORMATS:
        raise CheckpointError(f"--to {name}: no such format.{suggest(name, FORMATS)}")
    return FORMATS[name]


def formats_that_hold(sae: "SparseAutoencoder") -> list[str]:
    """Return the names of the formats that hold an SAE exactly."""
    return [name for name, each in FORMATS.items() if each.refusal(sae) is None]
