"""The names of runs and SAEs that follow from their settings."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from sae_train.config import SaeConfig
from sae_train.config.naming import LONGEST_NAME, shortened
from sae_train.errors import raise_all

USUAL = ("none", "free")
"""Choices of `nesting` and `parametrisation` that names leave out."""
LEAST_OF_SITE = 24
"""Bytes of a name that its site takes at least; only a seed of many digits leaves it fewer."""
DIGITS = len("-3fa9c1")
"""Bytes behind a name that is not unique, and behind the name of a run."""


def sae_names(saes: Sequence[tuple[SaeConfig, str, int]]) -> list[str]:
    """Return the name of each SAE of a run, with six hex digits of its settings where that is not unique.

    Args:
        saes: settings, label of the site and width of each SAE.

    Raises:
        ConfigError: two SAEs are equal.
    """
    names = [sae_name(config, site=site, n_features=n_features) for config, site, n_features in saes]
    digests = [_digest(*sae) for sae in saes]
    whole = [f"{name}-{digest}" if names.count(name) > 1 else name for name, digest in zip(names, digests, strict=True)]
    repeated = [name for name in dict.fromkeys(whole) if whole.count(name) > 1]
    raise_all([
        f"SAEs {' and '.join(str(place + 1) for place, other in enumerate(whole) if other == name)} of this run are "
        f"equal ({name[:-DIGITS]}). Remove all but one from variants and grid."
        for name in repeated
    ])  # fmt: skip
    return whole


def sae_name(config: SaeConfig, *, site: str, n_features: int) -> str:
    """Return the name of an SAE: `<site>.<sparsifier>[.<nesting>][.<parametrisation>].k<k>.f<n_features>.s<seed>`.

    The site is cut where the name would be too long for a directory.
    """
    words = [config.sparsifier.name, config.nesting.name, config.parametrisation.name]
    method = ".".join(word for word in words if word not in USUAL)
    sparsity = config.sparsity.replace("coefficient ", "c").replace("k ", "k")
    site, rest = _plain(site), _plain(f".{method}.{sparsity}.f{n_features}.s{config.seed}")
    site = shortened(site, max(LONGEST_NAME - len(rest) - DIGITS, LEAST_OF_SITE))
    return shortened(site + rest, LONGEST_NAME - DIGITS)


def run_name(saes: Sequence[tuple[SaeConfig, str, int]], *, model: str, digest: str) -> str:
    """Return the name of a run's directory where none is typed, such as `bundled.residual2.topk.k32.f2048.s0-3fa9c1`.

    Args:
        saes: settings, label of the site and width of each SAE. Several are only counted.
        model: short name of the language model, or of what takes its place.
        digest: digits of the run's identity.
    """
    if len(saes) > 1:
        return f"{shortened(_plain(model), LONGEST_NAME // 2)}.{len(saes)}_saes-{digest}"
    ((config, site, n_features),) = saes
    source = site if site == model else f"{model}.{site}"
    return f"{sae_name(config, site=source, n_features=n_features)}-{digest}"


def _digest(config: SaeConfig, site: str, n_features: int) -> str:
    """Return six hex digits of the settings of an SAE, with its site and width as the model resolved them."""
    settings: dict[str, Any] = dataclasses.asdict(config) | {"layer": site, "n_features": n_features, "expansion": None}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[: DIGITS - 1]


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)
