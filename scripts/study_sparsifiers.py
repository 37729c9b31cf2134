"""Compare all sparsifiers by their defaults: methods x k x seeds on three sources, one size a source.

    pip install matplotlib
    python scripts/study_sparsifiers.py --encoder ACTS --work WORK [--jobs 2]

Sources: the bundled model's residual stream, live; ACTS/train and ACTS/held_out, shuffled rows of a real encoder
(`harvest=tensors`); a synthetic dictionary with known truth (scripts/synthetic_dictionary.py, written to WORK). Every
run goes through the command line. Its figures come from its summary, at the exported L0, and from study_measures.py on
held-out rows. Rows that are in WORK/results.jsonl are not run again. --methods also takes the names in OPEN: values of
parameters that the papers leave open. WORK/study.md and WORK/study.png hold the tables and the picture
(scripts/study_report.py).
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import bundled_activations
import study_measures
import study_report
import synthetic_dictionary

METHODS: dict[str, list[str]] = {
    "topk": ["sparsifier=topk"],
    "topk, multi": ["sparsifier=topk", "sparsifier.multi_weight=0.125"],
    "mutual_choice": ["sparsifier=mutual_choice"],
    "mutual_choice, no aux": ["sparsifier=mutual_choice", "aux_loss=none"],
    "mutual_choice, aux_zipf": ["sparsifier=mutual_choice", "aux_loss=aux_zipf"],
    "mutual_choice, matryoshka": ["sparsifier=mutual_choice", "nesting=matryoshka"],
    "mutual_choice, aligned": ["sparsifier=mutual_choice", "parametrisation=aligned"],
    "feature_choice, uniform": ["sparsifier=feature_choice"],
    "feature_choice, zipf": ["sparsifier=feature_choice", "budget=zipf", "sparsifier.after=0.8"],
    "jumprelu": ["sparsifier=jumprelu"],
    "gated": ["sparsifier=gated"],
    "relu": ["sparsifier=relu"],
    "p_anneal": ["sparsifier=p_anneal"],
    "temporal_mask": ["sparsifier=temporal_mask"],
    "gradient": ["sparsifier=gradient"],  # bundled only: the other sources have no loss
}
_ZIPF_LOSS = METHODS["mutual_choice, aux_zipf"]
_MATRYOSHKA = METHODS["mutual_choice, matryoshka"]
_FEATURE_CHOICE = ["sparsifier=feature_choice", "budget=zipf"]
OPEN: dict[str, list[str]] = {
    "aux_k, weight 1/32": ["sparsifier=mutual_choice", "aux_loss.weight=0.03125"],
    "aux_zipf, weight 1/32": [*_ZIPF_LOSS, "aux_loss.weight=0.03125"],
    "aux_zipf, tau 0.1": [*_ZIPF_LOSS, "aux_loss.tau=0.1"],
    "aux_zipf, tau 1": [*_ZIPF_LOSS, "aux_loss.tau=1"],
    "aux_zipf, hard": [*_ZIPF_LOSS, "aux_loss.hard=true"],
    "aux_zipf, exponent 0.5": [*_ZIPF_LOSS, "aux_loss.exponent=0.5"],
    "feature_choice, zipf from the start": [*_FEATURE_CHOICE, "budget.exponent=1"],
    "feature_choice, zipf from 0.95": [*_FEATURE_CHOICE, "sparsifier.after=0.95"],
    "feature_choice, zipf exponent 1": [*_FEATURE_CHOICE, "sparsifier.after=0.8", "budget.exponent=1"],
    "feature_choice, zipf exponent 0.5": [*_FEATURE_CHOICE, "sparsifier.after=0.8", "budget.exponent=0.5"],
    "feature_choice, zipf, no aux": [*_FEATURE_CHOICE, "sparsifier.after=0.8", "aux_loss=none"],
    "matryoshka, a half and all": [*_MATRYOSHKA, "nesting.prefixes=[0.5,1.0]"],
    "matryoshka, a quarter and all": [*_MATRYOSHKA, "nesting.prefixes=[0.25,1.0]"],
    "matryoshka, three": [*_MATRYOSHKA, "nesting.prefixes=[0.25,0.5,1.0]"],
    "temporal_mask, deviations 1": ["sparsifier=temporal_mask", "sparsifier.deviations=1"],
    "temporal_mask, deviations 0.5": ["sparsifier=temporal_mask", "sparsifier.deviations=0.5"],
    "temporal_mask, strength 0.5": ["sparsifier=temporal_mask", "sparsifier.strength=0.5"],
    "gradient, beta 0.3": ["sparsifier=gradient", "sparsifier.beta=0.3"],
    "gradient, beta 3": ["sparsifier=gradient", "sparsifier.beta=3"],
}
"""What the papers leave open, tried where a claim failed; only what --methods names of these is run."""
KNOWN = METHODS | OPEN
SOURCES = {
    "bundled": {"n_features": 1024, "tokens": 300_000},
    "encoder": {"n_features": 1536, "tokens": 400_000},
    "synthetic": {"n_features": 1024, "tokens": 800_000, "batch_tokens": 1024},
}
KEPT = ("fvu", "l0", "dead_fraction", "delta_ce", "ce_recovered", "decoder_cosine_max")
STOPPED_BY_NUMBERS = 3
"""Exit status of a run that its method ended; any other error ends the study."""
Point = tuple[str, str, int, int]
"""Source, method, k, seed."""


def source_overrides(args: argparse.Namespace, source: str) -> list[str]:
    """Return the settings of a source's runs, without their method."""
    said = [f"{key}={value}" for key, value in SOURCES[source].items()]
    if source == "bundled":
        return said
    folder = args.encoder if source == "encoder" else args.work / "synthetic"
    return [*said, "harvest=tensors", f"harvest.path={folder}/train", f"harvest.held_out={folder}/held_out"]


def setting_of(args: argparse.Namespace, point: Point) -> dict[str, object]:
    """Return the settings of a row that its point leaves out; another setting is another run."""
    source, method, _, _ = point
    return {"overrides": KNOWN[method], **SOURCES[source], "acts": str(args.encoder) if source == "encoder" else ""}


def train(args: argparse.Namespace, point: Point, held_out: Path) -> dict[str, object]:
    """Run one point through the command line; return its row."""
    source, method, k, seed = point
    name = f"{source}-{method.replace(', ', '-').replace(' ', '_').replace('/', '_')}-k{k}-s{seed}"
    command = [sys.executable, "-m", "sae_train", *KNOWN[method], *source_overrides(args, source)]
    command += [f"k={k}", f"seed={seed}", "tracking=none", f"name={name}", "checkpoint.every_tokens=1000000000"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    done = subprocess.run(command, cwd=args.work, env=environment, capture_output=True, text=True)
    directory = args.work / "runs" / name
    row: dict[str, object] = {"source": source, "method": method, "k": k, "seed": seed, **setting_of(args, point)}
    if done.returncode == STOPPED_BY_NUMBERS:
        return row | {"failed": " ".join(done.stderr.strip().splitlines()[-1:])}
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    (figures,) = json.loads((directory / "summary.json").read_text())["saes"].values()
    row |= {key: figures[key] for key in KEPT if key in figures}
    row |= {key: figures["density"][key] for key in ("zipf_exponent", "zipf_r2") if key in figures["density"]}
    truth = args.work / "synthetic" / "truth.safetensors" if source == "synthetic" else None
    return row | study_measures.measure(next((directory / "saes").iterdir()), held_out, k=k, truth=truth)


def is_current(args: argparse.Namespace, row: dict) -> bool:
    """Return whether a row has the methods and sizes of this version."""
    point = (row["source"], row["method"], row["k"], row["seed"])
    known = row["source"] in SOURCES and row["method"] in KNOWN
    return known and all(row.get(key) == value for key, value in setting_of(args, point).items())


def held_out_rows(args: argparse.Namespace, source: str) -> Path:
    """Return the folder of a source's held-out rows; create it if needed."""
    if source == "encoder":
        return Path(args.encoder) / "held_out"
    folder = Path(args.work / source)
    if source == "synthetic":
        if not (folder / "truth.safetensors").exists():
            synthetic_dictionary.write(folder, seed=0, n_train=400_000, n_held_out=32_768)
    elif not (folder / "held_out").exists():
        bundled_activations.write_held_out(bundled_activations.started(), folder / "held_out")
    return folder / "held_out"


def points(args: argparse.Namespace) -> list[Point]:
    """Return the points to run, all methods of a seed before the next seed."""
    order = product(args.seeds, args.k, args.sources, args.methods)
    return [(s, m, k, seed) for seed, k, s, m in order if "gradient" not in m or s == "bundled"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder with train/ and held_out/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=KNOWN, metavar="METHOD")
    parser.add_argument("--k", type=int, nargs="*", default=[32, 16, 64])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    args = parser.parse_args()
    args.encoder, args.work = args.encoder.resolve(), args.work.resolve()
    return args


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    results = args.work / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    rows = [row for row in rows if is_current(args, row)]
    done = {(row["source"], row["method"], row["k"], row["seed"]) for row in rows}
    held_out = {source: held_out_rows(args, source) for source in args.sources}
    lock = threading.Lock()

    def once(point: Point) -> None:
        row = train(args, point, held_out[point[0]])
        with lock, results.open("a") as file:
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(once, [point for point in points(args) if point not in done]))
    study_report.write(rows, args.work)


if __name__ == "__main__":
    main()
