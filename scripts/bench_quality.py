"""Reconstruction quality of sae-train beside its peers, on one set of activations, by one evaluator.

    python scripts/bench_quality.py --train ACTS/train --held-out ACTS/held_out --work WORK \
        --n-features 6144 --k 32 --tokens 820000 --batch 2048

--train and --held-out hold *.safetensors files with a tensor `activations` [n, d_model]; the rows must be shuffled. The
peers are installed into environments of their own under --work (they are no dependency of ours), each is trained
with its default recipe and with learning rate 1e-3, and the better counts. Ours runs through the command line. Every
model is scored on the held-out rows (scripts/quality_score.py). What is already in WORK/results.jsonl for the same
setting is not run again. The table goes to standard output.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import venv
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
    "sae_lens.topk",
    "sae_lens.batch_topk",
    "dictionary_learning.topk",
    "dictionary_learning.batch_topk",
)
OUR_METHODS = ("ours.mutual_choice", "ours.topk")
RECIPES = {"default": None, "1e-3": 1e-3}
"""A peer's learning rates; None: its own."""


def environment(work: Path, peer: str) -> Path:
    """Return the Python of the peer's environment under work; make it when it is not there."""
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


def train_peer(args: argparse.Namespace, method: str, lr: float | None, out: Path) -> None:
    """Train a peer in its environment; writes the SAE to out."""
    python = environment(args.work, method.split(".")[0])
    command = [str(python), str(Path(__file__).with_name("quality_peers.py"))]
    command += ["--method", method, "--train", str(args.train), "--out", str(out), "--threads", str(args.threads)]
    command += ["--n-features", str(args.n_features), "--k", str(args.k)]
    command += ["--tokens", str(args.tokens), "--batch", str(args.batch)]
    if lr is not None:
        command += ["--lr", str(lr)]
    subprocess.run(command, check=True, env=quiet_environment(args))


def train_ours(args: argparse.Namespace, method: str, out: Path) -> None:
    """Train ours through its command line with its defaults; out becomes a link to the exported SAE."""
    run = out.parent / f"run-{out.name}"
    command = [sys.executable, "-m", "sae_train", "harvest=tensors", f"harvest.path={args.train}"]
    command += [f"harvest.held_out={args.held_out}", f"sparsifier={method.split('.')[1]}", "tracking=none"]
    command += [f"n_features={args.n_features}", f"k={args.k}", f"tokens={args.tokens}"]
    command += [f"batch_tokens={args.batch}", f"name={run.name}", *args.override]
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=run.parent, env=quiet_environment(args))
    seconds = time.perf_counter() - started
    (exported,) = (run.parent / "runs" / run.name / "saes").iterdir()
    out.symlink_to(exported, target_is_directory=True)
    (out.parent / f"{out.name}.seconds").write_text(f"{seconds}\n")


def quiet_environment(args: argparse.Namespace) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(args.threads), "WANDB_MODE": "disabled"}


def measure(args: argparse.Namespace, method: str, lr: float | None) -> dict[str, object]:
    """Train and score one method; returns its row of results.jsonl."""
    setting = setting_of(args)
    recipe = recipe_of(args, method, lr)
    digest = hashlib.sha256(json.dumps([setting, recipe]).encode()).hexdigest()[:6]
    out = args.work / "saes" / f"{method}-{digest}"
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        if method in OUR_METHODS:
            train_ours(args, method, out)
        else:
            train_peer(args, method, lr, out)
    if method in OUR_METHODS:
        seconds = float((out.parent / f"{out.name}.seconds").read_text())
    else:
        seconds = json.loads((out / "sae.json").read_text())["seconds"]
    figures = score_directory(out, args.held_out, k=args.k)
    return {"method": method, "recipe": recipe, **setting, **figures, "seconds": round(seconds, 1)}


def recipe_of(args: argparse.Namespace, method: str, lr: float | None) -> str:
    """Return what tells runs of one method apart in results.jsonl."""
    if method in OUR_METHODS:
        return " ".join(args.override) or "default"
    return "default" if lr is None else f"lr {lr:g}"


def setting_of(args: argparse.Namespace) -> dict[str, object]:
    """What has to agree for two rows of results.jsonl to be comparable."""
    names = ("n_features", "k", "tokens", "batch")
    return {"train": str(args.train), **{name: getattr(args, name) for name in names}}


def table(rows: list[dict]) -> str:
    """Return a Markdown table, one line a method: its better recipe at matched L0."""
    best: dict[str, dict] = {}
    for row in rows:
        held = best.get(row["method"])
        if held is None or row["matched"]["fvu"] < held["matched"]["fvu"]:
            best[row["method"]] = row
    lines = [
        "| method | recipe | FVU at matched L0 | L0 | dead | own path: FVU | L0 | dead | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(best.values(), key=lambda row: row["matched"]["fvu"]):
        cells = [row["method"], row["recipe"]]
        for path in ("matched", "own"):
            figures = row[path]
            cells += [f"{figures['fvu']:.4f}", f"{figures['l0']:.1f}", f"{figures['dead']:.1%}"]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
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
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=None, help=f"of {', '.join(PEER_METHODS + OUR_METHODS)}")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=RECIPES, help="of the peers")
    parser.add_argument("--override", nargs="*", default=[], help="further key=value for ours")
    args = parser.parse_args()
    for name in ("train", "held_out", "work"):
        setattr(args, name, getattr(args, name).resolve())
    unknown = set(args.only or ()) - set(PEER_METHODS + OUR_METHODS)
    if unknown:
        parser.error(f"--only: no method {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = [row for row in rows if all(row[key] == value for key, value in setting_of(args).items())]
    methods = args.only if args.only is not None else PEER_METHODS + OUR_METHODS
    for method in methods:
        for lr in (None,) if method in OUR_METHODS else [RECIPES[name] for name in args.recipes]:
            recipe = recipe_of(args, method, lr)
            if any((row["method"], row["recipe"]) == (method, recipe) for row in rows):
                continue
            row = measure(args, method, lr)
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
