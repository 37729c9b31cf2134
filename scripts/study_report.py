"""Tables, claims and the picture of study_sparsifiers.py from its rows."""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

Row = dict
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "fvu": ("FVU", lambda value: f"{value:.4f}"),
    "l0": ("L0", lambda value: f"{value:.1f}"),
    "delta_ce": ("delta CE", lambda value: f"{value:.3f}"),
    "dead_fraction": ("dead", lambda value: f"{value:.1%}"),
    "underused": ("underused", lambda value: f"{value:.0%}"),
    "rare_half": ("rarer half", lambda value: f"{value:.4f}"),
    "rare_share": ("its firings", lambda value: f"{value:.0%}"),
    "zipf_exponent": ("exponent", lambda value: f"{value:.2f}"),
    "zipf_r2": ("R^2", lambda value: f"{value:.3f}"),
    "cosine": ("cosine", lambda value: f"{value:.3f}"),
    "found": ("found", lambda value: f"{value:.0%}"),
    "parents_found": ("parents", lambda value: f"{value:.0%}"),
    "absorbed": ("absorbed", lambda value: f"{value:.1%}"),
    "missed": ("missed", lambda value: f"{value:.1%}"),
}
"""What the tables show, and how."""
SPREAD = ("fvu", "delta_ce")
"""Columns with the standard deviation over seeds beside the mean."""


def grouped(rows: list[Row]) -> dict[tuple[str, int], dict[str, list[Row]]]:
    """Return rows by (source, k) and method; failed runs are left out."""
    found: dict[tuple[str, int], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (row["source"], row["k"], row["seed"])):
        if "failed" not in row:
            found[row["source"], row["k"]][row["method"]].append(row)
    return found


def table(methods: dict[str, list[Row]]) -> str:
    """Return a Markdown table of one source and k, the least FVU first."""
    shown = [key for key in COLUMNS if any(key in row for rows in methods.values() for row in rows)]
    lines = ["| method | " + " | ".join(COLUMNS[key][0] for key in shown) + " | runs |"]
    lines.append("|" + "---|" * (len(shown) + 2))
    for method, rows in sorted(methods.items(), key=lambda pair: mean(row["fvu"] for row in pair[1])):
        cells = [method]
        for key in shown:
            values = [value for row in rows for value in listed(row.get(key))]
            form = COLUMNS[key][1]
            cell = form(mean(values)) if values else ""
            cells.append(cell + (f" +- {form(stdev(values))}" if key in SPREAD and len(values) > 1 else ""))
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return "\n".join(lines)


def listed(value: float | list[float | None] | None) -> list[float]:
    """Return a figure, or those of the parents that were found, as a list."""
    values = value if isinstance(value, list) else [value]
    return [one for one in values if one is not None and one == one]


def compare(key: str, one: Row, other: Row) -> float | None:
    """Return one run's figure compared with another's: a ratio for FVU, delta CE and worth, else a difference.

    worth: the FVU that the rarer half of the features saves, over its share of all firings. absorption: over the
    parents that both found, the share of tokens with a child on which the parent's feature is silent, less the share
    without one.
    """
    if abs(one["l0"] / other["l0"] - 1) > L0_TOLERANCE:
        return None
    if key == "worth":
        return (one["rare_half"] / one["rare_share"]) / (other["rare_half"] / other["rare_share"])
    if key == "absorption":
        if "absorbed" not in one or "absorbed" not in other:
            return None
        parts = zip(one["absorbed"], one["missed"], other["absorbed"], other["missed"], strict=True)
        both = [(a - b) - (c - d) for a, b, c, d in parts if a is not None and c is not None]
        return mean(both) if both else None
    if one.get(key) is None or other.get(key) is None:
        return None
    return one[key] / other[key] if key in RATIOS else one[key] - other[key]


def paired(rows: list[Row], key: str, method: str, beside: str) -> list[float]:
    """Return the comparisons of two methods in one figure, by source, k and seed, where their L0 nearly agrees."""
    by_point = {(row["source"], row["k"], row["seed"], row["method"]): row for row in rows if "failed" not in row}
    found = []
    for (source, k, seed, name), row in by_point.items():
        other = by_point.get((source, k, seed, beside))
        if name == method and other is not None:
            value = compare(key, row, other)
            found += [] if value is None else [value]
    return found


L0_TOLERANCE = 0.03
"""Largest relative difference in L0 of two runs that are compared."""
RATIOS = ("fvu", "delta_ce", "worth")
CLAIMS = (
    ("fvu", "mutual_choice", "topk"),
    ("fvu", "mutual_choice, aux_zipf", "mutual_choice"),
    ("dead_fraction", "mutual_choice, aux_zipf", "mutual_choice"),
    ("underused", "mutual_choice, aux_zipf", "mutual_choice"),
    ("fvu", "jumprelu", "topk"),
    ("fvu", "jumprelu", "gated"),
    ("fvu", "jumprelu", "mutual_choice"),
    ("fvu", "feature_choice, zipf", "mutual_choice"),
    ("rare_half", "feature_choice, zipf", "mutual_choice"),
    ("worth", "feature_choice, zipf", "mutual_choice"),
    ("delta_ce", "gradient", "topk"),
    ("absorption", "temporal_mask", "relu"),
    ("absorption", "temporal_mask", "topk"),
    ("absorption", "mutual_choice, matryoshka", "mutual_choice"),
    ("absorption", "mutual_choice, no aux", "mutual_choice"),
    ("absorption", "mutual_choice", "topk"),
    ("fvu", "mutual_choice, matryoshka", "mutual_choice"),
    ("fvu", "mutual_choice, aligned", "mutual_choice"),
    ("fvu", "topk, multi", "topk"),
)
"""Figure, method, and what it is set beside."""


def claims(rows: list[Row]) -> str:
    """Return a Markdown table of paired comparisons by source: mean (least to most) over k and seeds."""
    sources = sorted({row["source"] for row in rows})
    lines = ["| figure | of | beside | " + " | ".join(sources) + " |", "|" + "---|" * (3 + len(sources))]
    for key, method, beside in CLAIMS:
        cells = []
        for source in sources:
            found = paired([row for row in rows if row["source"] == source], key, method, beside)
            sign = "x" if key in RATIOS else ""
            form = "{:.3f}" if sign else "{:+.3f}"
            spread = f" ({form} to {form}, {{}} pairs)" if len(found) > 1 else " (1 pair)"
            whole = sign + form + spread
            cells.append(whole.format(*(f(found) for f in (mean, min, max, len)[: 4 if len(found) > 1 else 1]))
                         if found else "")  # fmt: skip
        name = {"worth": "rarer half, per firing", "absorption": "absorbed less missed"}.get(key) or COLUMNS[key][0]
        lines.append(f"| {name} | {method} | {beside} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(rows: list[Row], path: Path) -> None:
    """Draw FVU against exported L0, and the density curves at the k of most runs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sources = sorted({row["source"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colour = {method: plt.get_cmap("tab20")(number % 20) for number, method in enumerate(methods)}
    line = {method: "-" if number < 20 else "--" for number, method in enumerate(methods)}
    figure, axes = plt.subplots(2, len(sources), figsize=(5.2 * len(sources), 9), squeeze=False)
    for column, source in enumerate(sources):
        fvu, curves = axes[0, column], axes[1, column]
        main_k = Counter(row["k"] for row in rows if row["source"] == source).most_common(1)[0][0]
        for method in methods:
            own = [row for row in rows if row["source"] == source and row["method"] == method and "failed" not in row]
            by_k = {k: [row for row in own if row["k"] == k] for k in sorted({row["k"] for row in own})}
            style = {"color": colour[method], "linestyle": line[method], "label": method, "linewidth": 1.2}
            fvu.plot([mean(r["l0"] for r in some) for some in by_k.values()],
                     [mean(r["fvu"] for r in some) for some in by_k.values()],
                     marker="o", markersize=3, **style)  # fmt: skip
            middle = by_k.get(main_k, [])
            if middle:
                heights = [max(mean(values), 1e-6) for values in zip(*(row["density"] for row in middle), strict=True)]
                curves.plot([100 * i / (len(heights) - 1) for i in range(len(heights))], heights, **style)
        fvu.set(title=source, xlabel="exported L0", ylabel="FVU", xscale="log", xlim=(14, 72))
        fvu.set_xticks([16, 32, 64], labels=["16", "32", "64"])
        fvu.minorticks_off()
        curves.set(xlabel="rank, % of features", ylabel=f"firing density, k {main_k}", yscale="log", ylim=(1e-5, 1))
    handles = [
        mpl.lines.Line2D([], [], color=colour[method], linestyle=line[method], label=method) for method in methods
    ]
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(rows: list[Row], work: Path) -> None:
    """Write WORK/study.md and WORK/study.png."""
    parts = ["## Claims", claims(rows)]
    for (source, k), methods in grouped(rows).items():
        parts += [f"## {source}, k {k}", table(methods)]
    failed = [f"{row['source']} {row['method']} k {row['k']} seed {row['seed']}: {row['failed']}"
              for row in rows if "failed" in row]  # fmt: skip
    if failed:
        parts += ["## Runs that ended without an export", "\n".join(f"- {line}" for line in failed)]
    (work / "study.md").write_text("\n\n".join(parts) + "\n")
    picture([row for row in rows if "failed" not in row], work / "study.png")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write([json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()], folder)
