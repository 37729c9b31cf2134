"""Time a run of many SAEs on a CPU beside the sum of its parts: one harvest, and the steps of each SAE alone.

    python scripts/bench_suite.py [--rounds 5] [--steps 32] [experiment=suite ...]

Takes the settings that `sae-train` takes; the default is `experiment=suite` on the bundled model. A round times steps
as the run makes them, as many batches harvested alone, and the same number of steps of each SAE alone, on batches from
memory, one SAE after another. 32 steps take half of the default pool, so each part that harvests refills it once. It
prints the seconds of each, and the run over the sum of the others. Evaluation is not in it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae_train.cli.compose import compose_request
from sae_train.harvest.batch import Batch
from sae_train.harvest.build import build_stream, check_stream
from sae_train.ranks.interface import Solo
from sae_train.training.batch import gathered
from sae_train.training.provenance import resolve_precision
from sae_train.training.run import at_every_site, plan_of
from sae_train.training.trainer import Trainer, build_trainer


def build(said: list[str]) -> Trainer:
    """Return a trainer of these settings, its stream begun."""
    (point,) = compose_request(["tracking=none", *said], sweep=False).points
    config, ranks = point.config, Solo(torch.device("cpu"))
    source = config.source_for(point.saes)
    facts = check_stream(source, n_ranks=1)
    plan = plan_of(config, facts, n_ranks=1, saes=at_every_site(point.saes, facts))
    stream = build_stream(source, ranks=ranks, facts=facts)
    stream.start()
    precision = resolve_precision(config.precision, stored=None, device=ranks.device)
    return build_trainer(source, plan, stream=stream, precision=precision, ranks=ranks)


def timed(act: Callable[[], Any]) -> float:
    """Return the wall seconds of `act`."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


class Bench:
    """A trainer whose run, harvest and single SAEs are timed in turns."""

    def __init__(self, trainer: Trainer, *, steps: int) -> None:
        self._trainer, self._steps = trainer, steps
        self._n_read = 0
        self._batches: list[dict[str, Batch]] = []

    def run(self) -> None:
        """Make steps as the run makes them."""
        for _ in range(self._steps):
            self._trainer.step(self._read())

    def harvest(self) -> None:
        """Harvest as many batches, and keep them."""
        self._batches = [
            {site: rows.map(Tensor.clone) for site, rows in self._read().items()} for _ in range(self._steps)
        ]

    def alone(self) -> list[float]:
        """Return the seconds of as many steps of each SAE, on the batches of the last harvest."""
        trainer = self._trainer
        seconds = []
        for learner in trainer.learners:
            rows = [batch[learner.plan.site] for batch in self._batches]
            began = time.perf_counter()
            for step, own in enumerate(rows):
                learner.step(gathered(own, ranks=trainer.ranks, counts_all=False), step=trainer.n_done + step)
            seconds.append(time.perf_counter() - began)
        return seconds

    def _read(self) -> dict[str, Batch]:
        self._n_read += 1
        return self._trainer.stream.batch(self._n_read - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="steps in each part of a round")
    parser.add_argument("said", nargs="*", help="settings of sae-train")
    args = parser.parse_args()
    trainer = build([f"tokens={10**9}", *(args.said or ["experiment=suite"])])
    bench, ratios = Bench(trainer, steps=args.steps), []
    bench.run()  # not counted: first steps compile, and fill pools
    print(f"{len(trainer.learners)} SAEs, {args.steps} steps of {trainer.plan.batch_tokens} tokens\n")
    print("| run s | harvest s | sum of steps s | run / (harvest + sum) |\n|---|---|---|---|", flush=True)
    for _ in range(args.rounds):
        run, harvested, alone = timed(bench.run), timed(bench.harvest), sum(bench.alone())
        ratios.append(run / (harvested + alone))
        print(f"| {run:.2f} | {harvested:.2f} | {alone:.2f} | {ratios[-1]:.3f} |", flush=True)
    print(f"median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    trainer.stream.close()


if __name__ == "__main__":
    sys.exit(main())
