"""Count the operators of a training step, and the numbers that they pass through, for the predictions of time.

    python scripts/count_step.py [--sparsifier mutual_choice topk feature_choice] [--n-features 6144] [--d-model 384]

Printed for each operator that torch dispatches: how often, and the numbers of its largest tensor, over the matches of
the step; in the selection alone, and in the whole step. The counts in sae_train/training/work.py are sums over these.
Views are left out. Nothing is timed.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import bench_step
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {
    "view",
    "alias",
    "t",
    "transpose",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "split",
    "expand",
    "detach",
    "as_strided",
}
SHOWN = 0.4
"""Numbers a match below which an operator is only counted."""


class Counter(TorchDispatchMode):
    """Counts calls and numbers of each operator while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = defaultdict(int)
        self.numbers: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.calls[name] += 1
            self.numbers[name] += max((each.numel() for each in tensors), default=0)
        return result

    def show(self, title: str, *, matches: int) -> None:
        """Print the operators, those of the most numbers first."""
        print(f"{title}: {sum(self.calls.values())} operators, {matches} matches")
        for name, numbers in sorted(self.numbers.items(), key=lambda pair: -pair[1]):
            if numbers >= SHOWN * matches:
                print(f"  {name:28s} {self.calls[name]:4d} times, {numbers / matches:8.2f} numbers a match")


def count(point: dict[str, Any]) -> None:
    """Print the counts of one setting."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = bench_step.build(point, Path(scratch))
        for _ in range(point["warm_up"]):
            trainer.step(trainer.stream.batch(trainer.n_done))
        batch, (learner,) = trainer.stream.batch(trainer.n_done), trainer.learners
        selection, step = Counter(), Counter()
        select = learner.sparsifier.select  # type: ignore[attr-defined]  # allocators alone

        def counted(*given: Any) -> Any:
            with selection:
                return select(*given)

        learner.sparsifier.select = counted  # type: ignore[attr-defined]
        with step:
            trainer.step(batch)
    matches = point["k"] * point["batch_tokens"]
    selection.show(f"{point['sparsifier']}, selection", matches=matches)
    step.show(f"{point['sparsifier']}, the whole step", matches=matches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsifier", nargs="+", default=["mutual_choice", "topk", "feature_choice"])
    parser.add_argument("--n-features", type=int, default=6144)
    parser.add_argument("--d-model", type=int, default=384)
    args = parser.parse_args()
    for sparsifier in args.sparsifier:
        count({
            "d_model": args.d_model, "n_features": args.n_features, "k": 32, "batch_tokens": 2048, "train": "",
            "sparsifier": sparsifier, "aux_loss": "none", "precision": "float32", "override": [], "warm_up": 4,
            "repeats": 1,
        })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
