"""The model card of an export: README.md, with the front matter that the Hugging Face Hub reads."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sae_train.formats import record
from sae_train.formats.card_loading import LIBRARIES, loading_section
from sae_train.formats.citations import PAPERS, bibtex
from sae_train.formats.durable import write_text
from sae_train.formats.foreign import GIVES_ONE, UNKNOWN_MODEL
from sae_train.formats.own import NAME as OUR_FORMAT
from sae_train.formats.reading import MOST, read_json
from sae_train.hub import local_path

FILE = "README.md"
TAGS = ("sparse-autoencoder", "interpretability", "sae-train")
NO_LICENSE = "other"
"""`license` of a card without one. The Hub wants a `license_name` with it."""
FIGURES = {
    "l0": ("L0", "mean number of features that fire on a token", ".4g"),
    "fvu": ("FVU", r"sum \|\|x - x_hat\|\|^2 / sum \|\|x - mean x\|\|^2 over the whole set", ".4f"),
    "nmse": ("NMSE", r"mean of \|\|x - x_hat\|\|^2 / \|\|x\|\|^2 over tokens", ".4f"),
    "cosine": ("cosine", "mean cosine of x and x_hat over tokens", ".4f"),
    "dead_fraction": ("dead", "share of the features that fire on no evaluation token", ".2%"),
    "delta_ce": ("delta CE", "the model's cross-entropy with reconstructions, less that without, in nats", ".4f"),
    "ce_recovered": ("CE recovered", "1 - delta CE / the same difference with zeros in place of x_hat", ".2%"),
    "kl": ("KL", "mean KL divergence of the model's predictions with reconstructions, in nats", ".4f"),
    "evaluation_tokens": ("tokens", "held-out tokens behind the figures", ",d"),
}
"""Heading, definition and form of the figures of docs/metrics.md that a card shows."""
OF_A_SUITE = ("l0", "fvu", "delta_ce", "dead_fraction")
SITES = {"residual": "the residual stream after block {}", "mlp": "the output of the MLP of block {}",
         "attention": "the input of the attention's output projection in block {}"}  # fmt: skip


def write_card(
    directory: Path,
    folders: Sequence[PurePosixPath],
    *,
    format_name: str,
    able: Sequence[str],
    repo: str | None,
    license_name: str | None,
) -> None:
    """Write README.md into the directory of an export.

    Args:
        directory: of the export.
        folders: folders of its SAEs below `directory`. The card is written from the records there.
        format_name: of the export.
        able: names of the formats that hold all of the SAEs exactly.
        repo: ORG/NAME on the Hub. None where the export stays in a directory.
        license_name: identifier of the licence, such as 'mit'. None where the user gave none.
    """
    records = [read_json(directory / folder / record.FILE) for folder in folders]
    parts = [
        _front_matter(records, format_name, license_name),
        f"# {(repo or records[0]['name']).rpartition('/')[2] if repo or len(records) == 1 else 'Sparse autoencoders'}",
        _what(records),
        _suite(records, folders) if len(records) > 1 else "",
        _training(records),
        _figures(records[0]) if len(records) == 1 else _definitions(records),
        loading_section(repo=repo, folder=folders[0], format_name=format_name, able=able),
        _citation(records),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(directory / FILE, text.encode("utf-8", "replace").decode("utf-8"))  # the Hub takes UTF-8 alone


def _front_matter(records: Sequence[Mapping[str, Any]], format_name: str, license_name: str | None) -> str:
    """Return the YAML block. Strings are written as JSON, which is YAML."""
    values: dict[str, Any] = {"library_name": LIBRARIES.get(format_name, LIBRARIES[OUR_FORMAT])}
    values["license"] = license_name or NO_LICENSE
    if license_name is None:
        values["license_name"] = "not-stated"
    bases = list(dict.fromkeys(base for each in records if (base := base_model(each)) is not None))
    if bases:
        values["base_model"] = bases[0] if len(bases) == 1 else bases
    values["tags"] = [*TAGS, *(method.replace("_", "-") for method in _methods(records))]
    lines = []
    for key, value in values.items():
        many = isinstance(value, list)
        lines += [f"{key}:", *(f"- {json.dumps(each)}" for each in value)] if many else [f"{key}: {json.dumps(value)}"]
    return "\n".join(["---", *lines, "---"])


def base_model(content: Mapping[str, Any]) -> str | None:
    """Return the model of a record where it is an id on the Hub, and not a directory, a placeholder or the bundled one.

    A name without an organisation is an id where its commit is recorded.
    """
    model = content.get("model")
    if not isinstance(model, str) or model in (UNKNOWN_MODEL, "bundled") or local_path(model) is not None:
        return None
    has_owner = re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None
    return model if has_owner or content.get("model_revision") else None


def _methods(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the sparsifiers of the SAEs, and the nesting where there is one."""
    found = [str(each["sae"]["sparsifier"]) for each in records if each["sae"].get("sparsifier")]
    nested = ["matryoshka"] if any(len(each["sae"].get("prefixes") or ()) > 1 for each in records) else []
    return list(dict.fromkeys([*found, *nested]))


def _what(records: Sequence[Mapping[str, Any]]) -> str:
    first = records[0]
    if len(records) > 1:
        places = sorted({f"{each['site']} {each['layer']}" for each in records})
        return (f"{len(records)} sparse autoencoders of the activations of {_model(records)}, at {len(places)} "
                f"{'site' if len(places) == 1 else 'sites'}: {', '.join(places)}.")  # fmt: skip
    sae = first["sae"]
    rule = (
        "Features whose pre-activation is above their threshold fire."
        if sae["inference"] == "threshold"
        else f"The {round(sae['k'])} largest positive pre-activations of a token fire."
    )
    place = SITES[first["site"]].format(first["layer"])
    text = (f"A sparse autoencoder of {place} of {_model(records)}: {sae['n_features']:,} features of "
            f"{sae['d_model']:,} dimensions. {rule} It takes raw activations.")  # fmt: skip
    notes = "".join(f"\n- {re.sub(f' --[a-z]+ {GIVES_ONE}$', '', each)}" for each in first.get("assumed", ()))
    return text + (f"\n\nAssumed, because nothing is recorded:\n{notes}" if notes else "")


def _model(records: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(str(each["model"]) for each in records))
    return ", ".join("an unknown model" if name == UNKNOWN_MODEL else f"`{name}`" for name in names)


def _training(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of how the SAEs were trained. A row lists the values of all SAEs."""
    rows: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "method": lambda each: each["sae"].get("sparsifier"),
        "tokens": lambda each: _number(each.get("tokens")),
        "k": lambda each: each["sae"]["k"] or None,
        "seed": lambda each: each.get("seed"),
        "data": lambda each: _public(each.get("data")),
        "data revision": lambda each: each.get("data_revision"),
        "model revision": lambda each: each.get("model_revision"),
        "context length": lambda each: each["sae"].get("source", {}).get("context_length"),
        "filters": lambda each: _filters(each.get("filters")),
        "program": lambda each: each.get("run") and f"sae-train {each['run'].get('version')}",
    }
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        found = list(dict.fromkeys(str(given) for each in records if (given := value(each)) is not None))
        if found:
            lines.append(f"| {name} | {'; '.join(found)} |")
    if len(lines) == 2:
        return ""
    text = f"`{record.FILE}` beside each SAE holds all of this, every setting and every figure."
    return "\n".join(["## How it was trained", "", *lines, "", text])


def _filters(filters: Mapping[str, Any] | None) -> str | None:
    if filters is None:
        return None
    parts = [] if "special_tokens" not in filters else ["special tokens and the first position of a context left out"]
    limit = filters.get("outlier_limit")
    if limit is not None:
        parts.append(f"activations with a norm above {limit:.4g} {filters['over_limit']}")
    return ", ".join(parts)


def _public(data: Any) -> str | None:
    """Return a Hub id as it is, and the last part of a path, because the other parts may name a user."""
    if not isinstance(data, str):
        return None
    return data if local_path(data) is None else PurePosixPath(data).name


def _number(value: Any) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _figures(content: Mapping[str, Any]) -> str:
    figures = content["sae"].get("figures", {})
    rows = [(key, figures[key]) for key in FIGURES if _is_figure(figures.get(key))]
    if not rows:
        return ""
    lines = [f"| {FIGURES[key][0]} | {_form(key, value)} | {FIGURES[key][1]} |" for key, value in rows]
    return "\n".join(["## Figures", "", HELD_OUT, "", "| figure | value | definition |", "|---|---|---|", *lines])


HELD_OUT = (
    "Of held-out data: thresholds were set on one half of it, and the figures come from the other half. x is an "
    "activation, and x_hat its reconstruction."
)


def _is_figure(value: Any) -> bool:
    """Return whether a value can stand in a table: records of foreign files may hold any."""
    return isinstance(value, int | float) and abs(value) < MOST


def _form(key: str, value: Any) -> str:
    return format(int(value) if FIGURES[key][2] == ",d" else value, FIGURES[key][2])


def _definitions(records: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in OF_A_SUITE if any(key in each["sae"].get("figures", {}) for each in records)]
    if not keys:
        return ""
    lines = [f"| {FIGURES[key][0]} | {FIGURES[key][1]} |" for key in keys]
    return "\n".join(["## Figures", "", HELD_OUT, "", "| figure | definition |", "|---|---|", *lines])


def _suite(records: Sequence[Mapping[str, Any]], folders: Sequence[PurePosixPath]) -> str:
    heading = ["folder", "features", *(FIGURES[key][0] for key in OF_A_SUITE)]
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for each, folder in zip(records, folders, strict=True):
        figures = each["sae"].get("figures", {})
        cells = [_form(key, figures[key]) if _is_figure(figures.get(key)) else "-" for key in OF_A_SUITE]
        lines.append(f"| {' | '.join([f'`{folder}`', format(each['sae']['n_features'], ','), *cells])} |")
    return "\n".join(["## The autoencoders", "", *lines])


def _citation(records: Sequence[Mapping[str, Any]]) -> str:
    entries = bibtex(_methods(records))
    if not entries:
        return ""
    names = ", ".join(dict.fromkeys(PAPERS[name].method for name in _methods(records) if name in PAPERS))
    return f"## Citation\n\nThe method's paper ({names}):\n\n```bibtex\n{entries}\n```"
