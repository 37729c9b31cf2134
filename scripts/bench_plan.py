"""Predicted beside measured times of a step on this machine's CPU: one row a setting.

    python scripts/bench_plan.py [--sparsifier mutual_choice topk feature_choice] [--aux-loss none] [--intervals 6]

Each row is a short run in a process of its own: of the bundled language model (D 256, F 2048), and of random rows of
D 384 with F 1024, 6144 and 24576. The rates of the hardware are measured by turns with the intervals of the run,
because a machine that others use changes its speed. Measured is `perf/step_ms`, the median over the intervals.
Predicted is the sum of the parts of training that `plan.hardware` prints, from the median rates. The harvest of the
bundled model is compared, too; its pools are filled before the first interval.
"""

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measure_hardware  # before torch: it sets the threads
from bench_step import sparse_rows
from safetensors.torch import save_file

from sae_train.cli.compose import compose_config
from sae_train.harvest.build import build_stream, check_stream
from sae_train.harvest.meter import Meter
from sae_train.ranks.interface import Solo
from sae_train.training.hardware import Hardware
from sae_train.training.prediction import Prediction, predict
from sae_train.training.provenance import resolve_precision
from sae_train.training.run import plan_of
from sae_train.training.trainer import Events, build_trainer

INTERVAL = 5
"""Steps between rows of metrics."""
WIDTHS = (1024, 6144, 24576)
D_MODEL, BATCH = 384, 2048
WITHIN = 0.1
"""Seconds for each rate, each time."""


def overrides(point: dict[str, Any], scratch: Path) -> list[str]:
    """Return the settings of a run of enough steps. The first interval is a warm-up."""
    tokens = BATCH * INTERVAL * (point["intervals"] + 1)
    said = [f"tokens={tokens}", f"log_every={BATCH * INTERVAL}", "tracking=none", "checkpoint.every_tokens=0"]
    said += [f"sparsifier={point['sparsifier']}", f"aux_loss={point['aux_loss']}", "harvest.prefetch=0"]
    said += [f"precision={point['precision']}"]
    if point["n_features"] is None:
        return said
    save_file({"activations": sparse_rows(30_000, D_MODEL)}, scratch / "rows.safetensors")
    return [*said, "harvest=tensors", f"harvest.path={scratch}", f"n_features={point['n_features']}"]


def measure(point: dict[str, Any]) -> dict[str, float]:
    """Return the measured and predicted ms a step of a setting."""
    rates: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []

    def logged(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        rates.append(measure_hardware.measure(price=0, link=1e9, within=WITHIN, say=lambda line: None))

    with tempfile.TemporaryDirectory() as scratch:
        config = compose_config(overrides(point, Path(scratch)))
        facts = check_stream(config.source, n_ranks=1)
        plan = plan_of(config, facts, n_ranks=1)
        ranks = Solo()
        stream = build_stream(config.source, ranks=ranks, facts=facts)
        stream.start()
        precision = resolve_precision(config.precision, stored=None, device=ranks.device)
        trainer = build_trainer(config.source, plan, stream=stream, precision=precision, ranks=ranks)
        trainer.fit(Events(log=logged, evaluate=_nothing, checkpoint=_nothing, advance=lambda n: None,
                           stop=_nothing, fill=stream.fill))  # fmt: skip
    hardware = Hardware(name="here", **middle(rates[1:]))
    found = predict(plan, config.source, facts, hardware)
    return row_of(found, rows[1:], harvest=harvest_ms(trainer.stream.meter))


def harvest_ms(meter: Meter) -> float:
    """Return the ms that the language model takes for the tokens of a batch."""
    tokens = meter.tokens["harvested"]
    return 1e3 * BATCH * meter.seconds["harvested"] / tokens if tokens else 0.0


def row_of(found: Prediction, rows: list[dict[str, Any]], *, harvest: float) -> dict[str, float]:
    """Return a setting's figures: medians of its intervals, and the prediction."""
    return {
        "measured": statistics.median(row["perf/step_ms"] for row in rows),
        "predicted": 1e3 * found.training_seconds,
        "harvest": harvest,
        "predicted_harvest": 1e3 * found.harvest.get("language model", 0.0),
    }


def middle(rates: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each rate; fields of text are all equal."""
    first = rates[0]
    return {key: value if isinstance(value, str) else statistics.median(each[key] for each in rates)
            for key, value in first.items()}  # fmt: skip


def measured(point: dict[str, Any]) -> dict[str, float]:
    """Measure in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, point).result()


def _nothing(*_: Any) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsifier", nargs="+", default=["mutual_choice", "topk", "feature_choice"])
    parser.add_argument("--aux-loss", default="none")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--n-features", type=int, nargs="*", default=list(WIDTHS), help="widths for random rows")
    parser.add_argument("--intervals", type=int, default=6, help="intervals of 5 steps that count. Default: 6")
    parser.add_argument("--json", type=Path, help="append every setting's figures as a line")
    args = parser.parse_args()
    print(
        "| sparsifier | D, F | measured ms | predicted ms | predicted / measured |\n|---|---|---|---|---|", flush=True
    )
    for sparsifier in args.sparsifier:
        for n_features in (None, *args.n_features):
            point = {"sparsifier": sparsifier, "n_features": n_features, "aux_loss": args.aux_loss}
            point |= {"intervals": args.intervals, "precision": args.precision}
            found = measured(point)
            size = "256, 2048 (bundled)" if n_features is None else f"{D_MODEL}, {n_features}"
            cells = [sparsifier, size, f"{found['measured']:.1f}", f"{found['predicted']:.1f}"]
            print("| " + " | ".join([*cells, f"{found['predicted'] / found['measured']:.2f}"]) + " |", flush=True)
            if n_features is None:
                cells = [f"{found[name]:.1f}" for name in ("harvest", "predicted_harvest")]
                ratio = found["predicted_harvest"] / found["harvest"]
                print("| " + " | ".join(["harvest", "bundled", *cells, f"{ratio:.2f}"]) + " |", flush=True)
            if args.json is not None:
                with args.json.open("a") as file:
                    file.write(json.dumps(point | found) + "\n")


if __name__ == "__main__":
    sys.exit(main())
