"""`sae_train.json`, beside the files of every export: where the SAE comes from, how it was trained, how well it does.

Foreign headers hold little of it. `load` takes it back, so that an SAE keeps its record on its way through a format.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sae_train
from sae_train.errors import CheckpointError
from sae_train.formats.durable import write_text
from sae_train.formats.foreign import Opened, Origin
from sae_train.formats.manifest import SaeManifest
from sae_train.formats.reading import explained, printable, read_json, reason_of, short

FILE = "sae_train.json"
FIGURES = ("l0", "fvu", "delta_ce", "dead_fraction")
"""Figures that stand at the top of the record. The others are under `sae.figures`."""
RECORD_VERSION = 1


def record_of(
    manifest: SaeManifest,
    origin: Origin,
    *,
    name: str,
    format_name: str,
    run: Mapping[str, Any] | None,
    files: Sequence[str],
) -> dict[str, Any]:
    """Return the content of sae_train.json. What is not known is absent.

    Args:
        manifest: of the SAE.
        origin: what the foreign headers say of its activations.
        name: the SAE's name in its run.
        format_name: of the export.
        run: config.yaml of the run that trained it, if there is one.
        files: names of the files of the format.
    """
    source = manifest.source
    values = {
        "record_version": RECORD_VERSION,
        "sae_train_version": sae_train.__version__,
        "format": format_name,
        "name": name,
        "files": list(files),
        "model": origin.model,
        "model_revision": source.revision,
        "layer": origin.layer,
        "site": origin.site,
        "assumed": list(origin.assumed),
        "tokens": manifest.tokens,
        "seed": manifest.seed,
        "data": source.data,
        "data_revision": source.data_revision,
        "filters": _filters(manifest),
        **{key: manifest.figures.get(key) for key in FIGURES},
        "sae": manifest.as_json(),
        **({} if run is None else _run_part(run, name)),
    }
    return {key: value for key, value in values.items() if value is not None}


def _filters(manifest: SaeManifest) -> dict[str, Any] | None:
    """Return the rules that left activations out of training (harvest/filter.py). None where nothing is recorded."""
    if manifest.normalisation is None:
        return None
    limit = {"outlier_limit": manifest.normalisation.outlier_limit}
    share = manifest.figures.get("filtered_share")
    counted = limit if share is None else limit | {"share_over_limit": share}
    if manifest.source.context_length is None:  # from files, whose tokens are not known
        return counted | {"over_limit": "left out"}
    return counted | {"over_limit": "replaced by the next row within the limit", "special_tokens": "left out",
                      "first_position": "left out"}  # fmt: skip


def _run_part(run: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the entries that come from a run's config.yaml.

    Settings of one SAE among several stand there under its name. The plan holds the numbers that settings left open.
    """
    own = run.get("identity", {}).get("saes", {}).get(name, {})
    plan = run.get("plan", {})
    return {
        "config": {**run.get("config", {}), **own},
        "plan": plan.get(name, plan) or None,
        "run": run.get("provenance"),
    }


def run_in(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the entries of a run's config.yaml that a record holds, in the form that `record_of` takes."""
    if not isinstance(record.get("config"), dict):
        return None
    plan, run = record.get("plan"), record.get("run")
    return {
        "config": record["config"],
        "plan": plan if isinstance(plan, dict) else {},
        "provenance": run if isinstance(run, dict) else None,
    }


def name_in(directory: Path) -> str | None:
    """Return the name that an SAE has in the run that it comes from, if a record in its directory holds one."""
    path = directory / FILE
    name = read_json(path).get("name") if path.is_file() else None
    return name if isinstance(name, str) and is_plain_name(name) else None


def is_plain_name(name: str) -> bool:
    """Return whether a name is one folder's: without separators, control characters or a dot in front.

    The halves of surrogate pairs that stand for no byte are in no name of a file either.
    """
    bad = r"/\\\x00-\x1f\ud800-\udc7f\udd00-\udfff"
    return re.fullmatch(rf"[^.{bad}][^{bad}]{{0,199}}", name) is not None


def suite_paths(path: Path) -> list[tuple[str, str]]:
    """Return the name and the folder of each SAE in the suite.json of an export.

    Raises:
        CheckpointError: it is damaged.
    """
    with explained(path):
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise ValueError("not a list of SAEs")
    return [(str(entry.get("name")), str(entry["path"])) for entry in entries if "path" in entry]


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
        if not isinstance(record.get("sae"), dict):
            raise ValueError("holds no object 'sae'")
        assumed = record.get("assumed", [])
        if not isinstance(assumed, list):
            raise ValueError(f"assumed={short(assumed)}: must be a list of sentences")
        recorded = SaeManifest.from_json(record["sae"])
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {reason_of(error)}. Remove the file to open the SAE without its record."
        ) from error
    own = opened.manifest
    pairs = {key: (getattr(own, key), getattr(recorded, key)) for key in ("inference", "d_model", "n_features")}
    if own.inference == "topk":
        pairs["k"] = own.k, float(min(round(recorded.k), recorded.n_features))
    differ = [f"{key} {found!r} there, {said!r} in the record" for key, (found, said) in pairs.items() if found != said]
    if differ or record.get("format") != format_name:
        reason = ", ".join(differ) or f"it is of an export to {short(record.get('format'))}"
        raise CheckpointError(f"{path}: is the record of another SAE: {reason}. Remove it, or export again.")
    opened.sae.k = recorded.k
    sentences = tuple(printable(str(each)) for each in assumed)
    return Opened(sae=opened.sae, manifest=recorded, format_name=format_name, assumed=sentences)
