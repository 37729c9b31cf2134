"""Measure runs on a crowded machine: one alone, two at once, and one next to a busy process.

    python scripts/bench_crowded.py [--rounds 3] [--tokens 400000] [--variants shipped GOMP_SPINCOUNT=300000] [k=32]

Every round makes, for each variant in turn, one run alone, two at once, and one next to a Python process that counts.
`shipped` sets nothing; another variant is an environment variable, such as OMP_WAIT_POLICY=passive, or
GOMP_SPINCOUNT=300000, the default of GNU's OpenMP. Speeds are medians over the middle
half of a run's rows of metrics.jsonl, then over rounds. The machine must be idle otherwise.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SETTINGS = ["n_features=6144", "k=32", "aux_loss=none", "tracking=none", "evaluation_tokens=4000", "log_every=8192"]
"""Of every run, where they are not given."""
DECIDED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
"""Variables that the program decides; those of the caller are taken away."""
CONDITIONS = ("alone", "paired", "beside a busy process")
COUNTS = "while True: pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of each run")
    parser.add_argument("--variants", nargs="+", default=["shipped", "GOMP_SPINCOUNT=300000"])
    args, own = parser.parse_known_args()
    taken = {setting.partition("=")[0] for setting in own}
    settings = [*own, *(s for s in SETTINGS if s.partition("=")[0] not in taken), f"tokens={args.tokens}"]
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(args.rounds):
        order = args.variants if number % 2 == 0 else args.variants[::-1]
        for variant in order:
            for condition in CONDITIONS:
                speeds = measured(variant, condition, settings)
                found.setdefault((variant, condition), []).extend(speeds)
                print(
                    f"round {number + 1}, {variant}, {condition}: {', '.join(f'{s:,.0f}' for s in speeds)}", flush=True
                )
    print("| variant | alone, tokens/s | each of two | share kept | beside a busy process | share kept |")
    print("|---|---|---|---|---|---|")
    for variant in args.variants:
        alone, paired, busy = (statistics.median(found[variant, condition]) for condition in CONDITIONS)
        print(f"| {variant} | {alone:,.0f} | {paired:,.0f} | {paired / alone:.2f} | {busy:,.0f} | {busy / alone:.2f} |")


def measured(variant: str, condition: str, settings: list[str]) -> list[float]:
    """Return the tokens/s of each run that was made at once."""
    with tempfile.TemporaryDirectory() as scratch, busy(condition == CONDITIONS[2]):
        folders = [Path(scratch) / str(i) for i in range(2 if condition == "paired" else 1)]
        runs = [begun(variant, [*settings, f"runs={folder}"]) for folder in folders]
        said = [run.communicate()[1] for run in runs]
        if any(run.returncode for run in runs):
            sys.exit("\n".join(said))
        return [speed(folder) for folder in folders]


def begun(variant: str, arguments: list[str]) -> "subprocess.Popen[str]":
    """Start a run."""
    environment = {key: value for key, value in os.environ.items() if key not in DECIDED}
    if variant != "shipped":
        name, _, value = variant.partition("=")
        environment[name] = value
    command = [sys.executable, "-m", "sae_train", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def busy(is_wanted: bool) -> Iterator[None]:
    """Keep one core of the machine busy."""
    process = subprocess.Popen([sys.executable, "-c", COUNTS]) if is_wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def speed(folder: Path) -> float:
    """Return the median tokens/s over the middle half of a run's rows: the runs of a pair overlap there."""
    (path,) = folder.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    speeds = [row["perf/tokens_per_second"] for row in rows if "perf/tokens_per_second" in row]
    quarter = len(speeds) // 4
    return statistics.median(speeds[quarter : len(speeds) - quarter])


if __name__ == "__main__":
    main()
