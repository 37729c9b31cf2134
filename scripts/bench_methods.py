"""Time a training step of every sparsifier and of topk, on one set of activations, in one process by turns.

    python scripts/bench_methods.py --train ACTS/train [--n-features 3072] [--k 32] [--tokens 400000]

ACTS/train holds *.safetensors files with a tensor `activations`. Every method trains from its start to its end with its
defaults, one step each in turn, so that all of them meet the same machine. The table has the median CPU seconds of a
step in the run's last half (time.process_time, one thread; wall seconds on CUDA), their ratio to topk's, the aim for
that ratio, the seconds of both phases of penalised methods (with their zeros and without), and the mean L0 of the run.
`gradient` gets random gradients. Its cost does not depend on them, and leaves out the language model's backward pass.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sae_train.cli.compose import compose_config
from sae_train.harvest.build import build_stream, check_stream
from sae_train.ranks.interface import Solo
from sae_train.sae.code import DenseCode
from sae_train.training.provenance import resolve_precision
from sae_train.training.run import plan_of
from sae_train.training.trainer import build_trainer

METHODS: dict[str, tuple[list[str], float]] = {
    "topk": (["sparsifier=topk"], 1.0),
    "mutual_choice": (["sparsifier=mutual_choice"], 1.5),
    "feature_choice": (["sparsifier=feature_choice"], 1.5),
    "jumprelu": (["sparsifier=jumprelu"], 1.5),
    "gated": (["sparsifier=gated"], 1.5),
    "relu": (["sparsifier=relu"], 1.5),
    "p_anneal": (["sparsifier=p_anneal"], 1.5),
    "temporal_mask": (["sparsifier=temporal_mask"], 2.0),
    "matryoshka": (["sparsifier=mutual_choice", "nesting=matryoshka"], 2.0),
    "gradient": (["sparsifier=gradient"], 2.5),
    "aligned": (["sparsifier=mutual_choice", "parametrisation=aligned"], float("nan")),
    "topk, multi": (["sparsifier=topk", "sparsifier.multi_weight=0.125"], float("nan")),
}
"""What each is called, and how much of topk's step it may take (the rest: no aim)."""


class Watched:
    """A run, and the seconds of its steps."""

    def __init__(self, overrides: list[str], args: argparse.Namespace, folder: Path) -> None:
        said = ["harvest=tensors", f"harvest.path={folder}", "tracking=none", f"n_features={args.n_features}"]
        said += [f"k={args.k}", f"tokens={args.tokens}", f"batch_tokens={args.batch}"]
        config = compose_config([*said, *overrides])
        facts = check_stream(config.source, n_ranks=1)
        plan = plan_of(config, facts, n_ranks=1)
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        ranks = Solo(device)
        stream = build_stream(config.source, ranks=ranks, facts=facts)
        stream.start()
        precision = resolve_precision(config.precision, stored=None, device=device)
        self.trainer = build_trainer(config.source, plan, stream=stream, precision=precision, ranks=ranks)
        self.steps = plan.steps
        self.seconds: list[float] = []
        self.is_dense: list[bool] = []
        encode = self.trainer.learners[0].sparsifier.encode

        def noted(*parts: object) -> object:
            found = encode(*parts)
            self.is_dense.append(isinstance(found.code, DenseCode))
            return found

        self.trainer.learners[0].sparsifier.encode = noted

    def step(self) -> None:
        batch = self.trainer.stream.batch(self.trainer.n_done)
        started = now()
        self.trainer.step(batch)
        self.seconds.append(now() - started)

    def last_half(self) -> float:
        return statistics.median(self.seconds[self.steps // 2 :])

    def of_phase(self, *, dense: bool) -> float:
        return sum(s for s, is_dense in zip(self.seconds, self.is_dense, strict=True) if is_dense == dense)


def now() -> float:
    """Return seconds: of this process's CPU, or of the wall once the device has caught up."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def with_gradients(folder: Path, out: Path, n_rows: int) -> Path:
    """Write as many rows as asked for, each with a random gradient."""
    rows = []
    for path in sorted(folder.glob("*.safetensors")):
        rows.append(load_file(path)["activations"])
        if sum(map(len, rows)) >= n_rows:
            break
    activations = torch.cat(rows)[:n_rows].contiguous()
    gradients = torch.randn(activations.shape, generator=torch.Generator().manual_seed(0)).to(activations.dtype)
    save_file({"activations": activations, "gradients": gradients}, out / "rows.safetensors")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--n-features", type=int, default=3072)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = with_gradients(args.train, Path(scratch), min(args.tokens, 200_000))
        runs = {name: Watched(METHODS[name][0], args, folder) for name in dict.fromkeys(["topk", *args.methods])}
        for number in range(runs["topk"].steps):
            for run in runs.values():
                run.step()
            if number % 20 == 0:
                print(f"step {number} of {runs['topk'].steps}", file=sys.stderr, flush=True)
    print("| method | ms a step, last half | x topk | may be | seconds with zeros | without | mean L0 of the run |")
    print("|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        aim, row = METHODS[name][1], run.trainer.rows()[0]
        cells = [name, f"{1e3 * run.last_half():.0f}", f"{run.last_half() / runs['topk'].last_half():.2f}"]
        cells += [f"{aim:g}" if aim == aim else "-", f"{run.of_phase(dense=True):.1f}"]
        print("| " + " | ".join([*cells, f"{run.of_phase(dense=False):.1f}", f"{row['train/l0']:.1f}"]) + " |")


if __name__ == "__main__":
    main()
