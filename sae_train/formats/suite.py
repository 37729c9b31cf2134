"""`suite.json` and the table of a run with several SAEs: what each of them is, and how well it does."""

from collections.abc import Mapping, Sequence
from typing import Any

from sae_train.config import SaeConfig

FIGURES = ("l0", "target_l0", "fvu", "delta_ce", "ce_recovered", "dead_fraction")
"""Figures of an SAE's summary that its entry holds."""
WIDTH = 100
"""Columns of the table."""
LEAST_NAME = 16
"""Columns of an SAE's name at least."""
ABSENT = "-"


def suite_entry(
    name: str,
    figures: Mapping[str, Any],
    config: SaeConfig,
    *,
    site: str,
    d_model: int,
    n_features: int,
    tokens: int,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the entry of one SAE in suite.json. What does not apply is absent.

    Args:
        name: the SAE's name in the run.
        figures: its entry in the summary: figures, or `{"stopped": reason}`.
        config: its settings.
        site: label of its site, such as 'residual2'.
        d_model: width of the site's activations.
        n_features: width of the dictionary.
        tokens: tokens of the whole run; left out of the entry of a stopped SAE.
        source: what all activations of the run come from: model, revision, data.
        settings: other settings in which the run's SAEs differ, by dotted key.
    """
    entry: dict[str, Any] = {
        "name": name,
        "site": site,
        "layer": _block(site, config),
        "d_model": d_model,
        "width": n_features,
        "k": config.k,
        "sparsifier": config.sparsifier.name,
        "seed": config.seed,
        "settings": dict(settings) or None,
        **{key: source.get(key) for key in ("model", "revision", "data")},
    }
    if "stopped" in figures:
        entry["stopped"] = figures["stopped"]
    else:
        entry |= {key: figures.get(key) for key in FIGURES} | {"tokens": tokens, "path": f"saes/{name}"}
    return {key: value for key, value in entry.items() if value is not None}


def _block(site: str, config: SaeConfig) -> int | None:
    """Return the block of a site, such as 2 for 'residual2'. None where the site belongs to no block."""
    number = site.removeprefix(config.layer.kind)
    return int(number) if number != site and number.isdecimal() else None


def suite_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of a run's SAEs, one a line, at most 100 columns wide.

    Names leave out what all of them have in common, which the heading shows.

    Args:
        entries: results of `suite_entry`.
    """
    common, names = _shortened([entry["name"] for entry in entries])
    heading = (f"SAE {common}", "L0", "target", "FVU", "CE recovered", "dead")
    rows = [(name, *_cells(entry)) for name, entry in zip(names, entries, strict=True)]
    full = [row for row in (heading, *rows) if len(row) == len(heading)]
    widths = [max(len(row[column]) for row in full) for column in range(1, len(heading))]
    room = max(LEAST_NAME, WIDTH - sum(width + 2 for width in widths))
    first = min(room, max(len(row[0]) for row in (heading, *rows)))
    return "\n".join(_line(row, first, widths) for row in (heading, *rows))


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return an SAE's figures as text, or the reason why it was stopped alone."""
    if "stopped" in entry:
        return (f"stopped: {entry['stopped']}",)
    formats = {"l0": ".1f", "target_l0": ".4g", "fvu": ".3f", "ce_recovered": ".1%", "dead_fraction": ".1%"}
    return tuple(format(entry[key], how) if key in entry else ABSENT for key, how in formats.items())


def _line(row: Sequence[str], first: int, widths: Sequence[int]) -> str:
    name, *cells = row
    text = _cut(name, first).ljust(first)
    if len(cells) < len(widths):
        return _cut(f"{text}  {' '.join(cells[0].split())}", WIDTH)
    return text + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _cut(text: str, width: int) -> str:
    """Return `text` with dots in place of its end where it is longer than `width`."""
    return text if len(text) <= width else text[: width - 3] + "..."


def _shortened(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the words that all names share, with a star for the others, and the other words of each name.

    Example: `a.topk.k16.s0` and `b.topk.k16.s0` give `*.topk.k16.s0`, and `a` and `b`.
    """
    parts = [name.split(".") for name in names]
    if len({len(each) for each in parts}) == 1:
        same = [len(set(column)) == 1 for column in zip(*parts, strict=True)]
        pattern = [word if is_same else "*" for word, is_same in zip(parts[0], same, strict=True)]
        kept = [[word for word, is_same in zip(each, same, strict=True) if not is_same] for each in parts]
    else:
        least = min(map(len, parts)) - 1  # one word of each name stays
        tail = min(_shared([each[::-1] for each in parts]), least)
        head = min(_shared(parts), least - tail)
        pattern = [*parts[0][:head], "*", *parts[0][len(parts[0]) - tail :]]
        kept = [each[head : len(each) - tail] for each in parts]
    if not all(kept):  # a single name
        return "", list(names)
    return ".".join(pattern), [".".join(each) for each in kept]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """Return the number of first words that all lists have in common."""
    n_shared = 0
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        n_shared += 1
    return n_shared
