"""The identity of a run: the settings that can change its exported SAEs. A run finds its directory again by it."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sae_train.config.run import RunConfig
from sae_train.config.sae import SaeConfig

FREE_KEYS = ("name", "runs", "dry_run", "log_every", "evaluate_every", "checkpoint", "parallel", "plan", "tracking")
"""Top-level keys that cannot change the exported SAE. They are not part of a run's identity."""
LIST_KEYS = ("variants", "grid")
"""Top-level keys that make the list of SAEs. The list itself is part of the identity."""
SHOWN = ("layer", "k", "n_features", "expansion")
"""Settings of an SAE that every table shows."""
SAE_KEYS = tuple(field.name for field in dataclasses.fields(SaeConfig))
"""Top-level keys that belong to an SAE."""


def as_dict(config: RunConfig, saes: Sequence[SaeConfig]) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries, as it is written to config.yaml.

    In a run of several SAEs the settings of an SAE stand under `identity` alone, by the name of the SAE.
    """
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in SAE_KEYS}
    return values | dataclasses.asdict(saes[0]) if len(saes) == 1 else values


def identity(config: RunConfig, saes: Mapping[str, SaeConfig]) -> dict[str, Any]:
    """Return the part of the configuration that can change the exported SAEs, before any 'auto' is resolved.

    A run on ready-made tensors never reads a model, text or layer, so these are left out. The prefetch and the path of
    the run that budgets were taken from are left out, too. Several SAEs stand under `saes`, by name.
    """
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in (*FREE_KEYS, *LIST_KEYS)}
    if not config.harvest.runs_model:
        del values["model"]
        values["data"] = {"seed": config.data.seed}
    values["harvest"].pop("prefetch")  # when a batch is harvested changes nothing in it
    values = {key: value for key, value in values.items() if key not in SAE_KEYS}
    own = {name: _sae_identity(dataclasses.asdict(sae), config) for name, sae in saes.items()}
    return values | (next(iter(own.values())) if len(own) == 1 else {"saes": own})


def _sae_identity(values: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    if not config.harvest.runs_model:
        del values["layer"]
    values["budget"].pop("zipf_from", None)  # the exponent and shift that it gave are there
    return values


def identity_digest(values: dict[str, Any]) -> str:
    """Return six hex digits of `identity(config, saes)`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]


def differing(saes: Mapping[str, SaeConfig]) -> dict[str, dict[str, Any]]:
    """Return the settings, by dotted key, in which the SAEs of a run differ, for each SAE by its name.

    Site, sparsifier, k and width are left out: every table has them.
    """
    flat = {name: dict(_flat(dataclasses.asdict(sae))) for name, sae in saes.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    told = [key for key in keys if key.partition(".")[0] not in SHOWN and key != "sparsifier.name"]
    varied = [key for key in told if len({repr(values.get(key)) for values in flat.values()}) > 1]
    return {name: {key: values[key] for key in varied if key in values} for name, values in flat.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
