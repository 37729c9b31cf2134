"""Measure the GPU's rows of docs/performance.md, by one command on a machine with a CUDA GPU:

    python scripts/bench_gpu.py [--train ACTS/train --work WORK]

It runs the GPU's tests, then bench_step.py's measurement at the settings below. For each it prints the aim and the
measurement: step over floor, tokens a second, peak memory over the least memory (weights, moments, gradients and one
matrix of pre-activations, fp32), and the step over the same step without an auxiliary loss. With --train and --work it
also runs peers at 131072 features of those activations' width (bench_peers.py). Copy the table, with date, commit and
hardware, into the document.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import bench_step

ROOT = Path(__file__).resolve().parent.parent
WIDE = {"d_model": 4096, "n_features": 131072, "k": 64, "batch_tokens": 8192}
NARROW = {"d_model": 768, "n_features": 24576, "k": 32, "batch_tokens": 4096}
SETTINGS: list[tuple[dict[str, int], str, str, float, str]] = [
    (WIDE, "mutual_choice", "none", 0.0, "at most 1.7 of the floor, memory at most 1.3"),
    (WIDE, "topk", "none", 0.0, "at most 1.7 of the floor, memory at most 1.3"),
    (WIDE, "feature_choice", "none", 0.0, "at most 1.2 of topk's step"),
    (WIDE, "mutual_choice", "aux_k", 0.05, "at most twice the step without"),
    (NARROW, "mutual_choice", "none", 0.0, "4M tokens/s"),
]
"""Sizes, sparsifier, auxiliary loss, share of dead features, and the aim."""


def point_of(sizes: dict[str, int], sparsifier: str, aux_loss: str, dead: float) -> dict[str, Any]:
    """Return a setting as bench_step.py measures it."""
    common = {"precision": "bf16", "override": [], "warm_up": 20, "repeats": 15, "threads": 0}
    return {**sizes, "sparsifier": sparsifier, "aux_loss": aux_loss, "dead": dead, "train": "", **common}


def held(sizes: dict[str, int]) -> int:
    """Return the bytes of weights, two moments, gradients and one matrix of pre-activations."""
    weights = 2 * sizes["n_features"] * sizes["d_model"] + sizes["n_features"] + sizes["d_model"]
    return 4 * (4 * weights + sizes["batch_tokens"] * sizes["n_features"])


def report(settings: list[tuple[dict[str, int], str, str, float, str]]) -> None:
    """Measure and print the rows."""
    heads = ["D, F, k, N", "sparsifier", "aux loss", "step ms", "tokens/s", "step / floor", "memory / held"]
    print("| " + " | ".join([*heads, "/ without aux", "wanted"]) + " |")
    print("|" + "---|" * (len(heads) + 2), flush=True)
    steps: dict[tuple[str, str], float] = {}
    for sizes, sparsifier, aux_loss, dead, wanted in settings:
        found = bench_step.measured(point_of(sizes, sparsifier, aux_loss, dead))
        ms = found["ms"]
        size = ", ".join(str(sizes[name]) for name in ("d_model", "n_features", "k", "batch_tokens"))
        steps.setdefault((size, sparsifier), ms["step"])
        cells = [size, sparsifier, aux_loss, f"{ms['step']:.1f}", f"{1e3 * sizes['batch_tokens'] / ms['step']:,.0f}"]
        cells += [f"{ms['step'] / (ms['product'] + ms['adam']):.2f}", f"{found['memory'] / held(sizes):.2f}"]
        cells += [f"{ms['step'] / steps[size, sparsifier]:.2f}", wanted]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="folder of *.safetensors with `activations`, for the peers")
    parser.add_argument("--work", type=Path, help="where the peers are installed")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; on a CPU use bench_step.py and bench_peers.py")
    if (args.train is None) != (args.work is None):
        parser.error("--train and --work: give both, for the peers, or neither")
    tests = ["tests/kernels/test_triton.py", "tests/kernels/test_selection.py"]
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", *tests], cwd=ROOT)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; tests ended with {tested.returncode}", flush=True
    )
    report(SETTINGS)
    if args.train is not None:
        peers = [sys.executable, str(ROOT / "scripts" / "bench_peers.py"), "--precision", "bf16"]
        peers += ["--train", str(args.train), "--work", str(args.work), "--k", "64", "--batch", "8192"]
        subprocess.run([*peers, "--n-features", "131072"], check=True)


if __name__ == "__main__":
    main()
