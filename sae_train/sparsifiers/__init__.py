"""Sparsifiers: how pre-activations become a code. One module a family, one line here each."""

from sae_train.config import RunConfig
from sae_train.errors import ConfigError, suggest
from sae_train.sparsifiers.base import Sparsifier
from sae_train.sparsifiers.feature_choice import FeatureChoice
from sae_train.sparsifiers.gated import Gated
from sae_train.sparsifiers.gradient import Gradient
from sae_train.sparsifiers.jumprelu import JumpReLU
from sae_train.sparsifiers.l1 import PAnneal, ReLU
from sae_train.sparsifiers.mutual_choice import MutualChoice
from sae_train.sparsifiers.temporal_mask import TemporalMask
from sae_train.sparsifiers.topk import TopK

SPARSIFIERS: dict[str, type[Sparsifier]] = {
    "topk": TopK,
    "gradient": Gradient,
    "mutual_choice": MutualChoice,
    "batch_topk": MutualChoice,
    "feature_choice": FeatureChoice,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "relu": ReLU,
    "p_anneal": PAnneal,
    "temporal_mask": TemporalMask,
}


def build_sparsifier(config: RunConfig, *, n_features: int) -> Sparsifier:
    """Return the sparsifier that `config.sparsifier` names.

    Raises:
        ConfigError: no sparsifier of that name, or its budget does not fit the dictionary; the message says what does.
    """
    name = config.sparsifier.name
    if name not in SPARSIFIERS:
        raise ConfigError(f"sparsifier={name}: no such sparsifier.{suggest(name, SPARSIFIERS)}")
    return SPARSIFIERS[name](config, n_features=n_features)


__all__ = ["SPARSIFIERS", "Sparsifier", "build_sparsifier"]
