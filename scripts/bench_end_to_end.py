"""Time a run from end to end on a CPU, and its harvest and its training alone.

    python scripts/bench_end_to_end.py [--rounds 5] [--steps 64] [sparsifier=topk ...]

Takes the settings that `sae-train` takes; the default is its own, the bundled model. It takes turns: steps as a
run makes them, as many batches harvested alone, and steps on those batches from memory. It prints the seconds of each,
and the run over the sum of the two. On a GPU a background thread harvests, which turns would not show.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae_train.cli.compose import compose_config
from sae_train.harvest.batch import Batch
from sae_train.harvest.build import build_stream, check_stream
from sae_train.ranks.interface import Solo
from sae_train.training.provenance import resolve_precision
from sae_train.training.run import plan_of
from sae_train.training.trainer import Trainer, build_trainer


def build(said: list[str]) -> Trainer:
    """Return a trainer of these settings, its stream begun."""
    config = compose_config(["tracking=none", *said])
    ranks = Solo(torch.device("cpu"))
    facts = check_stream(config.source, n_ranks=1)
    plan = plan_of(config, facts, n_ranks=1)
    stream = build_stream(config.source, ranks=ranks, facts=facts)
    stream.start()
    precision = resolve_precision(config.precision, stored=None, device=ranks.device)
    return build_trainer(config.source, plan, stream=stream, precision=precision, ranks=ranks)


def timed(act: Callable[[], Any]) -> float:
    """Return the wall seconds of `act`."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64, help="steps in each part of a round")
    parser.add_argument("said", nargs="*", help="settings of sae-train")
    args = parser.parse_args()
    trainer = build([f"tokens={10**9}", *args.said])
    batches: list[dict[str, Batch]] = []
    n_read = 0

    def read() -> dict[str, Batch]:
        nonlocal n_read
        n_read += 1
        return trainer.stream.batch(n_read - 1)

    def both() -> None:
        for _ in range(args.steps):
            trainer.step(read())

    def harvest() -> None:
        for _ in range(args.steps):
            batches.append({site: rows.map(Tensor.clone) for site, rows in read().items()})

    def train() -> None:
        for batch in batches:
            trainer.step(batch)

    both()  # not counted: first steps compile, and fill pools
    ratios = []
    print("| run s | harvest s | training s | run / sum |\n|---|---|---|---|", flush=True)
    for _ in range(args.rounds):
        batches.clear()
        run, harvested, trained = timed(both), timed(harvest), timed(train)
        ratios.append(run / (harvested + trained))
        print(f"| {run:.3f} | {harvested:.3f} | {trained:.3f} | {ratios[-1]:.3f} |", flush=True)
    print(f"median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    trainer.stream.close()


if __name__ == "__main__":
    sys.exit(main())
