"""The numbers of an SAE that follow from its configuration and its site."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeSizes:
    """The sizes of one SAE and of its batches. The plan makes it; sparsifiers and auxiliary losses read it."""

    d_model: int
    """Width of the activations."""
    n_features: int
    """Features of the whole dictionary, over all ranks."""
    batch_tokens: int
    """Tokens of the global batch."""
    dead_window: int
    """Tokens without firing after which a feature is dead."""
