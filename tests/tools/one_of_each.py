"""The one site and the one SAE of a small run, for tests of a single SAE."""

from collections.abc import Mapping
from typing import Any, TypeVar

from sae_train.sae.autoencoder import SparseAutoencoder
from sae_train.training.export import export_all
from sae_train.training.trainer import Trainer

T = TypeVar("T")


def only(values: Mapping[str, T]) -> T:
    """Return the value of a mapping with one key, such as the batch of the one site."""
    (value,) = values.values()
    return value


def only_export(trainer: Trainer) -> tuple[SparseAutoencoder, dict[str, Any]]:
    """Return the one SAE of a trainer as it would be exported now, and its figures."""
    ((_, sae, figures),) = export_all(trainer)
    return sae, figures
