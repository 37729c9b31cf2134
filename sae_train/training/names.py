"""The names of runs and SAEs that follow from their settings."""

import re

from sae_train.config import SaeConfig
from sae_train.config.naming import LONGEST_NAME, shortened

USUAL = ("none", "free")
"""Choices of `nesting` and `parametrisation` that names leave out."""
LEAST_OF_SITE = 24
"""Bytes of a name that its site takes at least; only a seed of many digits leaves it fewer."""
DIGITS = len("-3fa9c1")
"""Bytes of a run's name behind the name of its SAE."""


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


def run_name(config: SaeConfig, *, site: str, n_features: int, digest: str) -> str:
    """Return the name of a run's directory where none is typed: the SAE's, and the digits of the run's identity."""
    return f"{sae_name(config, site=site, n_features=n_features)}-{digest}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)
