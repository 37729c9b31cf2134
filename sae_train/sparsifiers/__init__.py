"""Sparsifiers: how pre-activations become a code. One module a family.

`base.py` describes the interface. `allocator.py` computes the budget of a batch, and `feature_choice.py` splits it over
features. `penalised.py` with `price.py` steers a penalty instead.

To add one, write a module with a subclass of `Allocator` or `Penalised`, a config class in `config/sparsifiers.py`, its
values in `conf/sparsifier/NAME.yaml`, and a line in `config/sparsifier_registry.py`. Property tests pick it up.
"""

import importlib

from sae_train.config import SaeConfig
from sae_train.config.sparsifier_registry import SPARSIFIERS
from sae_train.errors import ConfigError, suggest
from sae_train.ranks.interface import Ranks
from sae_train.sae.sizes import SaeSizes
from sae_train.sparsifiers.base import Sparsifier


def sparsifier_class(name: str) -> type[Sparsifier]:
    """Return the class of a sparsifier.

    Raises:
        ConfigError: no sparsifier has that name.
    """
    if name not in SPARSIFIERS:
        raise ConfigError(f"sparsifier={name}: no such sparsifier.{suggest(name, SPARSIFIERS)}")
    module, _, class_name = SPARSIFIERS[name].implementation.partition(":")
    found: type[Sparsifier] = getattr(importlib.import_module(module), class_name)
    return found


def build_sparsifier(config: SaeConfig, sizes: SaeSizes, *, ranks: Ranks) -> Sparsifier:
    """Return the sparsifier that `config.sparsifier` names.

    Raises:
        ConfigError: no sparsifier has that name, or its budget does not fit the sizes. The message says what does.
    """
    return sparsifier_class(config.sparsifier.name)(config, sizes, ranks)


__all__ = ["SPARSIFIERS", "Sparsifier", "build_sparsifier", "sparsifier_class"]
