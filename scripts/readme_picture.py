"""Draw docs/results.png, the picture of the README, from the tables of docs/reports/.

    pip install matplotlib
    python scripts/readme_picture.py

Left: FVU at L0 32 of sae-train and of three other libraries (docs/reports/quality.md), each with the better of its two
recipes. Right: FVU against exported L0 of six sparsifiers, means of three seeds (docs/reports/study.md). Every number
is read from the tables, so the picture cannot differ from them.
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
LINES = {  # colours tell apart readers with any colour vision (Okabe and Ito)
    "mutual_choice": "#0072b2",
    "jumprelu": "#009e73",
    "topk": "#d55e00",
    "feature_choice, zipf": "#cc79a7",
    "gated": "#e69f00",
    "relu": "#56b4e9",
}


def table_after(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table after a heading, a list a row, without the table's head."""
    lines = text[text.index(f"{heading}\n") :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("**", "").replace("`", "") for cell in line.strip("|").split("|")])
    return rows


def libraries() -> dict[str, float]:
    """Return the FVU of each library and method, the better recipe of each."""
    best: dict[str, float] = {}
    for name, _, fvu, *_ in table_after((DOCS / "reports/quality.md").read_text(), "## Beside the peers"):
        label = re.sub(r" \([\d.]+\)$", "", name).replace("sparsifier=", "")
        value = sum(float(part) for part in fvu.split(",")) / len(fvu.split(","))
        best[label] = min(value, best.get(label, value))
    return best


def curves() -> dict[str, list[tuple[float, float]]]:
    """Return the points (L0, FVU) of each sparsifier on the encoder's activations."""
    text = (DOCS / "reports/study.md").read_text()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LINES}
    for k in (16, 32, 64):
        for method, fvu, l0, *_ in table_after(text, f"### encoder, k {k}"):
            if method in found:
                found[method].append((float(l0), float(fvu.split()[0])))
    return found


def draw(path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1.25, 1))
    bars = sorted(libraries().items(), key=lambda item: -item[1])
    colours = ["#0072b2" if name.startswith("sae-train") else "#bbbbbb" for name, _ in bars]
    left.barh([name for name, _ in bars], [fvu for _, fvu in bars], color=colours)
    for row, (_, fvu) in enumerate(bars):
        left.text(fvu + 0.001, row, f"{fvu:.3f}", va="center", fontsize=8)
    left.set_xlim(0, 0.155)
    left.set_title("Variance left unexplained (FVU) at L0 32", fontsize=10)
    left.tick_params(axis="y", labelsize=8)
    for name, points in curves().items():
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, color=LINES[name], label=name)
    right.set_xscale("log", base=2)
    right.set_xticks([16, 32, 64], ["16", "32", "64"])
    right.set_xlabel("L0 of the exported SAE", fontsize=9)
    right.set_title("FVU against L0, by sparsifier", fontsize=10)
    right.legend(fontsize=7, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(DOCS / "results.png")
