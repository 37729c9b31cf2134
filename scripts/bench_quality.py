"""Compare the reconstruction quality of sae-train with its peers, on one set of activations, by one evaluator.

    python scripts/bench_quality.py --train ACTS/train --held-out ACTS/held_out --work WORK \
        --n-features 6144 --k 32 --tokens 820000 --batch 2048

--train and --held-out hold *.safetensors files with a tensor `activations` [n, d_model]; the rows must be shuffled. The
peers are installed into environments of their own under --work (they are no dependency of ours), each is trained
with its default recipe and with learning rate 1e-3, and the better one counts. (Where a peer's sparsity has a penalty,
the peer also normalises its inputs.) Ours runs through the command line. Every model is scored on the held-out rows
(scripts/quality_score.py). Rows that are in WORK/results.jsonl for the same setting are not run again. The table goes
to standard output.

A peer whose sparsity has a penalty instead of a k is run up to --searches times a recipe. The search starts at its
default coefficient and takes secants of log L0 over log coefficient, until its own L0 is within a tenth of k. The run
whose L0 is nearest k counts.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from quality_score import score_directory

TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "sparsify": ("a", [TORCH, "eai-sparsify==1.3.3", "sae-lens==6.54.12"], []),
    "sae_lens": ("a", [TORCH, "eai-sparsify==1.3.3", "sae-lens==6.54.12"], []),
    # Its nnsight imports torchvision, which does not load beside a CPU build of torch.
    "dictionary_learning": ("b", [TORCH, "dictionary-learning==0.1.0"], ["torchvision"]),
}
PEER_METHODS = (
    "sparsify.topk",
    "sae_lens.jumprelu_tanh",
    *(
        f"{peer}.{method}"
        for peer in ("sae_lens", "dictionary_learning")
        for method in ("topk", "batch_topk", "matryoshka", "jumprelu", "gated")
    ),
)
OUR_METHODS = {
    "ours.mutual_choice": ["sparsifier=mutual_choice"],
    "ours.topk": ["sparsifier=topk"],
    "ours.matryoshka": ["sparsifier=mutual_choice", "nesting=matryoshka"],
    "ours.jumprelu": ["sparsifier=jumprelu"],
    "ours.gated": ["sparsifier=gated"],
}
"""With what each adds to the command line."""
METHODS = (*PEER_METHODS, *OUR_METHODS)
COEFFICIENTS = {
    "sae_lens.jumprelu": 1.0,
    "sae_lens.jumprelu_tanh": 1.0,
    "sae_lens.gated": 1.0,
    "dictionary_learning.jumprelu": 1.0,
    "dictionary_learning.gated": 0.1,
}
"""The peers' default coefficients, from which a search for k starts."""
NEAR_K = 0.1
"""A search ends when L0 is off by at most this share of k."""
NO_DIFFERENCE = 0.05
"""Of the logarithm of L0."""
FARTHEST = math.log(30)
"""A search changes a coefficient by at most this factor at once."""
RECIPES = {"default": None, "1e-3": 1e-3}
"""A peer's learning rates; None: its own."""


def environment(work: Path, peer: str) -> Path:
    """Return the Python of the peer's environment under work; create the environment if needed."""
    name, packages, unwanted = ENVIRONMENTS[peer]
    root = work / f"env-{name}"
    python, ready = root / "bin" / "python", root / "ready"
    if not ready.exists():
        venv.create(root, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        if unwanted:
            subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *unwanted], check=True)
        ready.touch()
    return python


def train_peer(args: argparse.Namespace, method: str, lr: float | None, coefficient: float | None, out: Path) -> None:
    """Train a peer in its environment and write the SAE to out."""
    python = environment(args.work, method.split(".")[0])
    command = [str(python), str(Path(__file__).with_name("quality_peers.py"))]
    command += ["--method", method, "--train", str(args.train), "--out", str(out), "--threads", str(args.threads)]
    command += ["--n-features", str(args.n_features), "--k", str(args.k)]
    command += ["--tokens", str(args.tokens), "--batch", str(args.batch), "--seed", str(args.seed)]
    if lr is not None:
        command += ["--lr", str(lr)]
    if coefficient is not None:
        command += ["--coefficient", str(coefficient)]
    subprocess.run(command, check=True, env=quiet_environment(args))


def train_ours(args: argparse.Namespace, method: str, out: Path) -> None:
    """Train ours through the command line with its defaults, and link out to the exported SAE."""
    run = out.parent / f"run-{out.name}"
    command = [sys.executable, "-m", "sae_train", "harvest=tensors", f"harvest.path={args.train}"]
    command += [f"harvest.held_out={args.held_out}", *OUR_METHODS[method], "tracking=none"]
    command += [f"n_features={args.n_features}", f"k={args.k}", f"tokens={args.tokens}"]
    command += [f"batch_tokens={args.batch}", f"seed={args.seed}", f"name={run.name}", *args.override]
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=run.parent, env=quiet_environment(args))
    seconds = time.perf_counter() - started
    (exported,) = (run.parent / "runs" / run.name / "saes").iterdir()
    out.symlink_to(exported, target_is_directory=True)
    (out.parent / f"{out.name}.seconds").write_text(f"{seconds}\n")


def quiet_environment(args: argparse.Namespace) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    return {**os.environ, **threads, "WANDB_MODE": "disabled"}


def measure(args: argparse.Namespace, method: str, lr: float | None, coefficient: float | None) -> dict[str, object]:
    """Train and score one method; return its row of results.jsonl."""
    setting = setting_of(args)
    recipe = recipe_of(args, method, lr)
    told_apart = [setting, recipe] if coefficient is None else [setting, recipe, coefficient]
    digest = hashlib.sha256(json.dumps(told_apart).encode()).hexdigest()[:6]
    out = args.work / "saes" / f"{method}-{digest}"
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        if method in OUR_METHODS:
            train_ours(args, method, out)
        else:
            train_peer(args, method, lr, coefficient, out)
    if method in OUR_METHODS:
        seconds = float((out.parent / f"{out.name}.seconds").read_text())
    else:
        seconds = json.loads((out / "sae.json").read_text())["seconds"]
    figures = score_directory(out, args.held_out, k=args.k)
    row = {"method": method, "recipe": recipe, "coefficient": coefficient}
    return {**row, **setting, **figures, "seconds": round(seconds, 1)}


def next_coefficient(tried: list[tuple[float, float]], *, first: float, k: int) -> float | None:
    """Return the coefficient to try after those tried (coefficient, L0), or None when one has come near k.

    None, too, after three runs whose coefficient made no difference: thresholds that a short run cannot move far enough
    stay where they are at any price. More coefficient is less L0. Within a bracket the secant of the logarithms is kept
    off its ends; outside, its slope is taken as -1 until two runs tell it.
    """
    if not tried:
        return first
    if any(abs(l0 - k) <= NEAR_K * k for _, l0 in tried):
        return None
    points = sorted((math.log(coefficient), math.log(max(l0, 1.0) / k)) for coefficient, l0 in tried)
    dense = [point for point in points if point[1] > 0]
    if len(dense) == len(points) >= 3 and points[-1][1] > points[0][1] - NO_DIFFERENCE:
        return None
    sparse = [point for point in points if point[1] <= 0]
    if dense and sparse:
        (x0, y0), (x1, y1) = max(dense), min(sparse)
        x = x0 + (x1 - x0) * min(0.8, max(0.2, y0 / (y0 - y1)))
    else:
        x, y = max(dense) if dense else min(sparse)
        slope = -1.0
        if len(points) > 1:
            (x0, y0), (x1, y1) = points[-2:] if dense else points[:2]
            slope = min(-0.1, (y1 - y0) / (x1 - x0))
        x += min(FARTHEST, max(-FARTHEST, -y / slope))
    return float(f"{math.exp(x):.3g}")


def recipe_of(args: argparse.Namespace, method: str, lr: float | None) -> str:
    """Return the name of a recipe, by which results.jsonl tells runs of one method apart."""
    if method in OUR_METHODS:
        return " ".join(args.override) or "default"
    return "default" if lr is None else f"lr {lr:g}"


def setting_of(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings that two comparable rows of results.jsonl share."""
    names = ("n_features", "k", "tokens", "batch", "seed")
    folders = {"train": str(args.train), "held_out": str(args.held_out)}
    return {**folders, **{name: getattr(args, name) for name in names}}


def nearest(rows: list[dict], k: int) -> list[dict]:
    """Return a row for each method and recipe; a search is represented by the run whose own L0 is nearest k."""
    found: dict[tuple[str, str], dict] = {}

    def distance(row: dict) -> float:
        return abs(math.log(max(row["l0"], 1e-3) / k)) if row.get("coefficient") is not None else 0.0

    for row in rows:
        held = found.get((row["method"], row["recipe"]))
        if held is None or distance(row) < distance(held):
            found[row["method"], row["recipe"]] = row
    return list(found.values())


def table(rows: list[dict], k: int) -> str:
    """Return a Markdown table with a line for each method: its better recipe at matched L0."""
    best: dict[str, dict] = {}
    for row in nearest(rows, k):
        held = best.get(row["method"])
        if held is None or row["matched"]["fvu"] < held["matched"]["fvu"]:
            best[row["method"]] = row
    lines = [
        "| method | recipe | FVU at matched L0 | L0 | dead | matched by | own path: FVU | L0 | dead | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(best.values(), key=lambda row: row["matched"]["fvu"]):
        coefficient = row.get("coefficient")
        recipe = row["recipe"] + (f", coefficient {coefficient:g}" if coefficient is not None else "")
        matching = row.get("matching", "threshold" if row["inference"] == "threshold" else "none")
        by = f"{matching} {row['cut']:.3g}" if matching == "factor" else matching
        matched, own = (
            [f"{row[path]['fvu']:.4f}", f"{row[path]['l0']:.1f}", f"{row[path]['dead']:.1%}"]
            for path in ("matched", "own")
        )
        lines.append("| " + " | ".join([row["method"], recipe, *matched, by, *own, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="directory of training activations")
    parser.add_argument("--held-out", type=Path, required=True, help="directory of held-out activations")
    parser.add_argument("--work", type=Path, default=Path("quality"), help="environments, models and results go here")
    parser.add_argument("--n-features", type=int, default=6144)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=820_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="threads of each library; 0 leaves torch's choice"
    )
    parser.add_argument(
        "--only", nargs="*", default=None, help=f"whole names or parts after the dot: {', '.join(METHODS)}"
    )
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES, help="recipes of the peers")
    parser.add_argument("--searches", type=int, default=4, help="largest number of runs in a search for k")
    parser.add_argument("--override", nargs="*", default=[], help="further key=value for ours")
    args = parser.parse_args()
    for name in ("train", "held_out", "work"):
        setattr(args, name, getattr(args, name).resolve())
    unknown = set(args.only or ()) - {*METHODS, *(method.split(".")[1] for method in METHODS)}
    if unknown:
        parser.error(f"--only: no method {', '.join(sorted(unknown))}")
    if any(text.startswith("seed=") for text in args.override):
        parser.error("--override: seed has an option of its own, --seed")
    return args


def runs(args: argparse.Namespace, method: str, lr: float | None, rows: list[dict]) -> Iterator[dict]:
    """Yield the rows of one method and recipe that are not in rows yet; the caller adds them."""
    recipe = recipe_of(args, method, lr)

    def done() -> list[dict]:
        return [row for row in rows if (row["method"], row["recipe"]) == (method, recipe)]

    if method not in COEFFICIENTS:
        if not done():
            yield measure(args, method, lr, None)
        return
    while len(done()) < args.searches:
        tried = [(row["coefficient"], row["l0"]) for row in done()]
        coefficient = next_coefficient(tried, first=COEFFICIENTS[method], k=args.k)
        if coefficient is None:
            return
        yield measure(args, method, lr, coefficient)


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = [row for row in rows if all(row.get(key) == value for key, value in setting_of(args).items())]
    for method in METHODS:
        if args.only is not None and not {method, method.split(".")[1]} & set(args.only):
            continue
        for lr in (None,) if method in OUR_METHODS else [RECIPES[name] for name in args.recipes]:
            for row in runs(args, method, lr, rows):
                rows.append(row)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), file=sys.stderr, flush=True)
    print(table(rows, args.k))


if __name__ == "__main__":
    main()
