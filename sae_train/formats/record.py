"""`sae_train.json`, beside the files of every export: where the SAE comes from, how it was trained, how well it does.

Foreign headers hold little of it. `load` takes it back, so that an SAE keeps its record on its way through a format.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sae_train
from sae_train.errors import CheckpointError
from sae_train.formats.durable import write_text
from sae_train.formats.foreign import Opened, Origin
from sae_train.formats.manifest import SaeManifest
from sae_train.formats.reading import read_json

FILE = "sae_train.json"
FIGURES = ("l0", "fvu", "delta_ce", "dead_fraction")
"""Figures that stand at the top of the record. The others are under `sae.figures`."""
RECORD_VERSION = 1


def record_of(
    manifest: SaeManifest, origin: Origin, *, name: str, format_name: str, run: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the content of sae_train.json. What is not known is absent.

    Args:
        manifest: of the SAE.
        origin: what the foreign headers say of its activations.
        name: the SAE's name in its run.
        format_name: of the export.
        run: config.yaml of the run that trained it, if there is one.
    """
    source = manifest.source
    values = {
        "record_version": RECORD_VERSION,
        "sae_train_version": sae_train.__version__,
        "format": format_name,
        "name": name,
        "model": origin.model,
        "model_revision": source.revision,
        "layer": origin.layer,
        "site": origin.site,
        "assumed": list(origin.assumed),
        "tokens": manifest.tokens,
        "seed": manifest.seed,
        "data": source.data,
        "data_revision": source.data_revision,
        "filters": None if manifest.normalisation is None else {"outlier_limit": manifest.normalisation.outlier_limit},
        **{key: manifest.figures.get(key) for key in FIGURES},
        "sae": manifest.as_json(),
        "config": None if run is None else run.get("config"),
        "run": None if run is None else {key: run.get(key) for key in ("version", "git_commit", "torch", "overrides")},
    }
    return {key: value for key, value in values.items() if value is not None}


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write sae_train.json."""
    write_text(directory / FILE, json.dumps(record, indent=2) + "\n")


def with_record(opened: Opened, directory: Path, *, format_name: str) -> Opened:
    """Return an SAE as read, with the facts of its sae_train.json, where there is one.

    The tensors, the rule and the sizes stay those of the foreign files.

    Raises:
        CheckpointError: the record is damaged, or is of another SAE.
    """
    path = directory / FILE
    if not path.is_file():
        return opened
    record = read_json(path)
    try:
        recorded = SaeManifest.from_json(record["sae"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}. Remove the file to open the SAE without its record.") from error
    own = opened.manifest
    pairs = {key: (getattr(own, key), getattr(recorded, key)) for key in ("inference", "d_model", "n_features")}
    if own.inference == "topk":
        pairs["k"] = own.k, float(min(round(recorded.k), recorded.n_features))
    differ = [f"{key} {found!r} there, {said!r} in the record" for key, (found, said) in pairs.items() if found != said]
    if differ or record.get("format") != format_name:
        reason = ", ".join(differ) or f"it is of an export to {record.get('format')!r}"
        raise CheckpointError(f"{path}: is the record of another SAE: {reason}. Remove it, or export again.")
    opened.sae.k = recorded.k
    assumed = tuple(str(each) for each in record.get("assumed", ()))
    return Opened(sae=opened.sae, manifest=recorded, format_name=format_name, assumed=assumed)
