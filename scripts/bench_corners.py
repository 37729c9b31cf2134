"""Run the defaults at the corners of (width, expansion, k, tokens), and half and twice their learning rate.

    python scripts/bench_corners.py --acts 128=ACTS128 --acts 384=ACTS384 --acts 768=ACTS768 --work WORK

ACTS holds train/ and held_out/ with *.safetensors files of a tensor `activations` [n, d_model], rows shuffled. Every
corner is one `sae-train harvest=tensors` run with defaults (an epoch more where tokens exceed the rows), then, up to
--grid-below cost, one run at each of --factors of its learning rate. Figures are the run's own summary: held-out FVU,
exported L0, dead features. What is already in WORK/corners.jsonl is not run again. The table goes to standard output.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# (width, expansion, k, tokens): a half fraction of the cube 128..768 x 4..16 x 8..128 x 0.5M..3M, its largest
# member at width 384 so that each ends within ten minutes on two cores.
CORNERS = (
    (128, 4, 8, 500_000),
    (128, 4, 128, 3_000_000),
    (128, 16, 8, 3_000_000),
    (128, 16, 128, 500_000),
    (768, 4, 8, 3_000_000),
    (768, 4, 128, 500_000),
    (768, 16, 8, 500_000),
    (384, 16, 128, 3_000_000),
)


def train(args: argparse.Namespace, corner: tuple[int, int, int, int], lr: float | None, seed: int) -> dict:
    """Run one corner through the command line; return its row of corners.jsonl."""
    width, expansion, k, tokens = corner
    acts = args.acts[width]
    name = f"d{width}-x{expansion}-k{k}-{tokens // 1000}k-s{seed}" + (f"-lr{lr:.3g}" if lr else "")
    command = [sys.executable, "-m", "sae_train", "harvest=tensors", f"harvest.path={acts}/train"]
    command += [f"harvest.held_out={acts}/held_out", f"sparsifier={args.sparsifier}", f"n_features={width * expansion}"]
    command += [f"k={k}", f"tokens={tokens}", f"seed={seed}", "tracking=none", f"name={args.sparsifier}-{name}"]
    command += [f"optimizer.lr={lr}"] if lr else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=args.work, env=environment, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    directory = args.work / "runs" / f"{args.sparsifier}-{name}"
    (figures,) = json.loads((directory / "summary.json").read_text())["saes"].values()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    peak = max(row["train/learning_rate"] for row in rows if "train/learning_rate" in row)
    return {"corner": list(corner), "sparsifier": args.sparsifier, "lr": lr, "peak_lr": peak, "seed": seed,
            "seconds": round(seconds, 1), **{key: figures[key] for key in ("fvu", "l0", "dead_fraction")}}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Return a Markdown table, one line a corner and learning rate."""
    lines = [
        "| width, n_features, k, tokens | learning rate | seed | FVU | L0 | dead | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["corner"], row["sparsifier"], row["lr"] or 0, row["seed"])):
        width, expansion, k, tokens = row["corner"]
        rate = f"{row['lr']:.3g}" if row["lr"] else f"**default, {row['peak_lr']:.3g}**"
        lines.append(
            f"| {width}, {width * expansion}, {k}, {tokens / 1e6:g}M | {rate} | {row['seed']} "
            f"| {row['fvu']:.4f} | {row['l0']:.1f} | {row['dead_fraction']:.1%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--acts", action="append", required=True, help="activations of one width, as WIDTH=DIR; may be repeated"
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sparsifier", default="mutual_choice")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--factors", type=float, nargs="*", default=[0.5, 2.0])
    parser.add_argument(
        "--grid-below",
        type=float,
        default=2e12,
        help="run the other learning rates up to this cost, in width * n_features * tokens",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    pairs = (text.split("=", 1) for text in args.acts)
    args.acts = {int(width): Path(path).resolve() for width, path in pairs}
    args.work = args.work.resolve()
    return args


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "corners.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []

    def once(corner: tuple[int, int, int, int], lr: float | None, seed: int) -> dict:
        for row in rows:
            same = row["lr"] is None if lr is None else row["lr"] is not None and abs(row["lr"] / lr - 1) < 1e-6
            if row["corner"] == list(corner) and row["sparsifier"] == args.sparsifier and row["seed"] == seed and same:
                return row
        row = train(args, corner, lr, seed)
        rows.append(row)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row

    corners = sorted((c for c in CORNERS if c[0] in args.acts), key=lambda c: c[0] ** 2 * c[1] * c[3])
    for seed in args.seeds:
        for corner in corners:
            default = once(corner, None, seed)
            if corner[0] ** 2 * corner[1] * corner[3] <= args.grid_below:
                for factor in args.factors:
                    once(corner, default["peak_lr"] * factor, seed)
    print(table(rows))


if __name__ == "__main__":
    main()
