"""Time our training step and the peers', on the same activations, by turns in one run.

    python scripts/bench_peers.py --train ACTS/train --work WORK [--n-features 6144 ...] [--k 32] [--batch 2048]
        [--held-out ACTS/held_out] [--library sae_lens sparsify dictionary_learning]

--train holds *.safetensors files with a tensor `activations`. The peers are installed into environments of their own
under --work (they are no dependency of ours). Every library runs in a process of its own (speed_peers.py), in fp32 and
under bf16 autocast where it offers that (ours: precision=bf16), its Triton kernels on where they run. After --warm-up
steps each takes --steps steps in turn, --rounds times, while the others wait. One more step before them is not counted:
it finds the others' numbers in the caches. The table has the median ms of a step, tokens a second, and the ratio of our
tokens a second to theirs for the same method (mutual_choice is BatchTopK). Auxiliary losses are off for all libraries,
because most steps have no dead features.

With --held-out every method is also trained whole (--tokens) and scored by bench_quality.py's evaluator, so that no
library wins by doing less. Rows that are in WORK/results.jsonl are not trained again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_quality

RUNS = {  # library and method; the method of ours that it is held against; bf16 is offered
    ("ours", "mutual_choice"): "mutual_choice",
    ("sae_lens", "batch_topk"): "mutual_choice",
    ("dictionary_learning", "batch_topk"): "mutual_choice",
    ("ours", "topk"): "topk",
    ("sparsify", "topk"): "topk",
    ("sae_lens", "topk"): "topk",
    ("dictionary_learning", "topk"): "topk",
}
WITHOUT_BF16 = () if torch.cuda.is_available() else ("dictionary_learning",)
"""Whose autocast does nothing here."""
Run = tuple[str, str, bool]


class Process:
    """A library in its environment, which steps on request."""

    def __init__(self, run: Run, args: argparse.Namespace, n_features: int) -> None:
        library, method, bf16 = run
        python = Path(sys.executable) if library == "ours" else bench_quality.environment(args.work, library)
        command = [str(python), str(Path(__file__).with_name("speed_peers.py")), "--library", library]
        command += ["--method", method, "--train", str(args.train), "--k", str(args.k)]
        command += ["--n-features", str(n_features), "--tokens", str(args.tokens), "--batch", str(args.batch)]
        command += ["--threads", str(args.threads)] + (["--bf16"] if bf16 else [])
        environment = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(Path(__file__).parent)}
        log = (args.work / f"speed-{library}-{method}{'-bf16' if bf16 else ''}.log").open("w")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self._log = log.name

    def steps(self, n: int) -> list[float]:
        """Return the seconds of its next n steps."""
        self._process.stdin.write(f"{n}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._log}: a library ended before its steps were done; its last words are there.")
        return json.loads(answer)

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def timed(runs: list[Run], args: argparse.Namespace, n_features: int) -> dict[Run, float]:
    """Return each run's median seconds of a step."""
    processes = {run: Process(run, args, n_features) for run in runs}
    for process in processes.values():
        process.steps(args.warm_up)
    seconds: dict[Run, list[float]] = {run: [] for run in runs}
    for _ in range(args.rounds):
        for run, process in processes.items():
            seconds[run] += process.steps(1 + args.steps)[1:]  # the first finds the others' numbers in the caches
    for process in processes.values():
        process.end()
    return {run: statistics.median(each) for run, each in seconds.items()}


def quality(run: Run, args: argparse.Namespace, n_features: int) -> str:
    """Return the exported FVU, L0 and dead share of a run of --tokens, the better of the peer's two learning rates."""
    library, method, bf16 = run
    if args.held_out is None or (bf16 and library != "ours"):
        return "-"
    override = ["precision=bf16"] if bf16 else []
    given = argparse.Namespace(**vars(args) | {"n_features": n_features, "override": override, "seed": 0})
    name = f"{library}.{method}"
    path, rows = args.work / "results.jsonl", []
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    found: list[dict[str, Any]] = []
    for rate in [None] if library == "ours" else list(bench_quality.RECIPES.values()):
        recipe, setting = bench_quality.recipe_of(given, name, rate), bench_quality.setting_of(given)
        wanted = {"method": name, "recipe": recipe, **setting}
        known = [row for row in rows if wanted.items() <= row.items()]
        if not known:
            known = [bench_quality.measure(given, name, rate, None)]
            with path.open("a") as file:
                file.write(json.dumps(known[0]) + "\n")
        found.append(known[0])
    best = min((row["matched"] for row in found), key=lambda figures: figures["fvu"])
    return f"{best['fvu']:.4f}, {best['l0']:.1f}, {best['dead']:.1%}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--n-features", type=int, nargs="+", default=[6144])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=820_000)
    parser.add_argument("--precision", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    peers = sorted({library for library, _ in RUNS} - {"ours"})
    parser.add_argument(
        "--library", nargs="+", default=peers, choices=peers, help="libraries to run; fewer where memory is short"
    )
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps in each turn, without the first, which is not counted"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="threads of each library; 0 leaves torch's choice")
    args = parser.parse_args(arguments)
    for name in ("train", "held_out", "work"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).resolve())  # ours is trained in a directory of its own
    for name in ("train", "held_out"):
        folder = getattr(args, name)
        if folder is not None and not any(folder.glob("*.safetensors")):
            parser.error(f"--{name.replace('_', '-')}: no *.safetensors in {folder}")
    return args


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    print("| F | library | method | precision | ms a step | tokens/s | ours does | held-out FVU, L0, dead |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for n_features in args.n_features:
        for precision in args.precision:
            there = {"ours", *args.library} - set(WITHOUT_BF16 if precision == "bf16" else ())
            runs = [(*each, precision == "bf16") for each in RUNS if each[0] in there]
            seconds = timed(runs, args, n_features)
            for run in runs:
                library, method, bf16 = run
                own = seconds["ours", RUNS[library, method], bf16]
                cells = [str(n_features), library, method, precision, f"{1e3 * seconds[run]:.1f}"]
                cells += [f"{args.batch / seconds[run]:,.0f}", f"{seconds[run] / own:.1f}x"]
                print("| " + " | ".join([*cells, quality(run, args, n_features)]) + " |", flush=True)


if __name__ == "__main__":
    main()
