"""What a training step costs beside its floor, and where the time goes: one row a setting.

    python scripts/bench_step.py [--d-model 384] [--n-features 6144] [--k 32] [--batch-tokens 2048]
        [--sparsifier mutual_choice topk feature_choice] [--aux-loss none] [--dead 0.05] [--train ACTS/train]
    python scripts/bench_step.py --growth        # D, F, k and N varied one by one, and the fitted exponents

Every option but --dead and --train takes several values; all combinations are run, each in a process of its own. A run
trains for --warm-up steps first, on rows of ACTS/train (*.safetensors with a tensor `activations`) or, without it, on
sparse sums of random directions with Zipf frequencies. Then steps are timed by turns with the floor: the fastest matrix
product of the encoder's shape that torch has here, and a triad over as many bytes as Adam moves (28 a parameter).
Printed: medians in ms, tokens a second, step over floor, memory at its most (on a CPU the process's, with the rows that
it made), and the mean ms of each part, timed in steps of their own (encode: the product, in bf16 one that only finds
candidates; select: with the exact values of candidates; decode; aux: the auxiliary loss; backward; update: gradients'
projection, norm and clipping, Adam, normalisation; rest: counters and sums). --dead makes a share of the
features dead, for what an auxiliary loss costs then.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sae_train import kernels
from sae_train.cli.compose import compose_config
from sae_train.harvest.build import build_stream, check_stream
from sae_train.ranks.interface import Solo
from sae_train.training import learner as learners
from sae_train.training.provenance import resolve_precision
from sae_train.training.run import plan_of
from sae_train.training.step_clock import peak_memory_bytes
from sae_train.training.trainer import Trainer, build_trainer

ADAM_BYTES, TRIAD_BYTES = 28, 12
"""Of a parameter: gradient read, weight and two moments read and written; of an element of a + b -> c, all fp32."""
PARTS = ("encode", "select", "decode", "aux", "backward", "update")
GROWTH = {
    "d_model": [192, 384, 768, 1536],
    "n_features": [1536, 3072, 6144, 12288, 24576, 49152],
    "k": [8, 16, 32, 64, 128],
    "batch_tokens": [512, 1024, 2048, 4096, 8192],
}
BASE = {"d_model": 384, "n_features": 6144, "k": 32, "batch_tokens": 2048}


def sparse_rows(n_rows: int, d_model: int) -> torch.Tensor:
    """Return [n_rows, d_model] sums of 16 of 4 x d_model unit directions each, drawn by Zipf's law, with noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_model, d_model, generator=generator), dim=1)
    weight = 1 / (torch.arange(len(directions), dtype=torch.float64) + 10)
    active = torch.multinomial(weight, 16 * n_rows, replacement=True, generator=generator).view(n_rows, 16)
    strength = torch.randn(n_rows, 16, generator=generator).mul(0.25).exp()
    rows = torch.nn.functional.embedding_bag(active, directions, per_sample_weights=strength, mode="sum")
    return rows + 0.1 * torch.randn(n_rows, d_model, generator=generator) / math.sqrt(d_model)


def rows_of(folder: Path, n_rows: int) -> torch.Tensor:
    """Return the first rows of a folder's files."""
    rows: list[torch.Tensor] = []
    for path in sorted(folder.glob("*.safetensors")):
        rows.append(load_file(path)["activations"])
        if sum(map(len, rows)) >= n_rows:
            break
    return torch.cat(rows)[:n_rows].float().contiguous()


def build(point: dict[str, Any], scratch: Path) -> Trainer:
    """Return a trainer of this setting, its first rows written to `scratch`."""
    n_tokens = point["batch_tokens"] * (point["warm_up"] + 4 * point["repeats"] + 8)
    n_rows = min(n_tokens, 400_000_000 // point["d_model"] // 4)
    rows = rows_of(Path(point["train"]), n_rows) if point["train"] else sparse_rows(n_rows, point["d_model"])
    save_file({"activations": rows}, scratch / "rows.safetensors")
    said = ["harvest=tensors", f"harvest.path={scratch}", "harvest.prefetch=0", "tracking=none"]
    said.append(f"tokens={n_tokens}")
    said += [
        f"{name}={point[name]}" for name in ("n_features", "k", "batch_tokens", "sparsifier", "aux_loss", "precision")
    ]
    config = compose_config(said + point["override"])
    facts = check_stream(config.source, n_ranks=1)
    plan = plan_of(config, facts, n_ranks=1)
    ranks = Solo(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    stream = build_stream(config.source, ranks=ranks, facts=facts)
    stream.start()
    precision = resolve_precision(config.precision, stored=None, device=ranks.device)
    return build_trainer(config.source, plan, stream=stream, precision=precision, ranks=ranks)


def timed(act: Callable[[], Any]) -> float:
    """Return the wall seconds of `act`, the device's work in them."""
    settle()
    began = time.perf_counter()
    act()
    settle()
    return time.perf_counter() - began


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def floors(trainer: Trainer) -> tuple[list[Callable[[], Any]], Callable[[], Any]]:
    """Return every way to compute the encoder's product, and a triad of Adam's bytes."""
    learner, n_tokens = trainer.learners[0], trainer.plan.batch_tokens
    dictionary = learner.dictionary
    x_ND = torch.randn(n_tokens, dictionary.d_model, device=trainer.ranks.device)
    W_FD, b_F = dictionary.W_enc.detach().clone(), dictionary.b_enc.detach().clone()
    out_NF = x_ND.new_empty(n_tokens, dictionary.n_features)
    products = [lambda: kernels.affine(x_ND, W_FD, b_F, precision=learner.precision, out=out_NF)]
    products.append(lambda: torch.addmm(b_F, x_ND, W_FD.t(), out=out_NF))
    if learner.precision == "bf16":
        x_bf16, W_bf16 = x_ND.bfloat16(), W_FD.bfloat16()
        out_bf16 = out_NF.bfloat16()
        products.append(lambda: torch.mm(x_bf16, W_bf16.t(), out=out_bf16))
    n_parameters = sum(parameter.numel() for parameter in dictionary.parameters())
    a, b, c = (x_ND.new_ones(n_parameters * ADAM_BYTES // TRIAD_BYTES) for _ in range(3))
    return products, lambda: torch.add(a, b, out=c)


@contextmanager
def parts_noted(trainer: Trainer) -> Iterator[dict[str, float]]:
    """Note how long each part of the steps inside takes, in all."""
    spent = dict.fromkeys(PARTS, 0.0)
    backward = torch.Tensor.backward

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*given: Any, **named: Any) -> Any:
            found: list[Any] = []
            spent[name] += timed(lambda: found.append(call(*given, **named)))
            return found[0]

        return inner

    learner = trainer.learners[0]
    sparsifier = learner.sparsifier
    select = "select" if hasattr(sparsifier, "select") else "encode"
    places: list[tuple[Any, str, str]] = [(learner, "_pre_activations", "encode"), (sparsifier, select, "select")]
    places += [(learners, "reconstruct", "decode"), (learner, "_update", "update")]
    before = [getattr(owner, attribute) for owner, attribute, _ in places]
    for (owner, attribute, name), call in zip(places, before, strict=True):
        setattr(owner, attribute, noted(name, call))
    aux = learner.aux_loss
    if aux is not None:
        learner.aux_loss = noted("aux", aux)
    torch.Tensor.backward = noted("backward", backward)
    try:
        yield spent
    finally:
        torch.Tensor.backward = backward
        learner.aux_loss = aux
        for (owner, attribute, _), call in zip(places, before, strict=True):
            setattr(owner, attribute, call)


def kill_share(trainer: Trainer, share: float) -> None:
    """Make the last features dead: affinities too small for a cut, half of them positive, and counters that say so."""
    learner = trainer.learners[0]
    n_dead = round(share * learner.dictionary.n_features)
    if n_dead:
        learner.dictionary.W_enc.data[-n_dead:] = 1e-3 * learner.dictionary.W_dec.data[-n_dead:]
        learner.dictionary.b_enc.data[-n_dead:] = 0
        learner.firing.since_F[-n_dead:] = trainer.learners[0].plan.dead_window


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Return a setting's figures in ms: step, product, adam, and the parts."""
    if point["threads"]:
        torch.set_num_threads(point["threads"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build(point, Path(scratch))

        def step() -> float:
            batch = trainer.stream.batch(trainer.n_done)
            kill_share(trainer, point["dead"])
            return timed(lambda: trainer.step(batch))

        for _ in range(point["warm_up"]):
            step()
        before = peak_memory_bytes()
        products, triad = floors(trainer)
        for each in (*products, triad):
            each()
        steps, adam = [], []
        product: list[list[float]] = [[] for _ in products]
        for _ in range(point["repeats"]):
            steps.append(step())
            for ways, each in zip(product, products, strict=True):
                ways.append(timed(each))
            adam.append(timed(triad))
        with parts_noted(trainer) as spent:
            whole = sum(step() for _ in range(point["repeats"]))
    ms = {name: 1e3 * seconds / point["repeats"] for name, seconds in spent.items()}
    ms["rest"] = 1e3 * whole / point["repeats"] - sum(ms.values())
    ms |= {"step": 1e3 * statistics.median(steps), "adam": 1e3 * statistics.median(adam)}
    ms["product"] = 1e3 * min(statistics.median(ways) for ways in product)
    return {"ms": ms, "memory": before, "fvu": trainer.rows()[0]["train/fvu"]}


def measured(point: dict[str, Any]) -> dict[str, Any]:
    """Measure in a fresh process, so that its memory is this setting's alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, point).result()


def row(point: dict[str, Any], found: dict[str, Any]) -> str:
    """Return a line of the table."""
    ms = found["ms"]
    floor = ms["product"] + ms["adam"]
    cells = [point["sparsifier"], point["aux_loss"], point["precision"]]
    cells += [str(point[name]) for name in BASE]
    cells += [f"{ms['step']:.1f}", f"{1e3 * point['batch_tokens'] / ms['step']:,.0f}", f"{ms['product']:.1f}"]
    cells += [f"{ms['adam']:.1f}", f"{ms['step'] / floor:.2f}", f"{found['memory'] / 1e9:.2f}"]
    cells += [f"{ms[name]:.1f}" for name in (*PARTS, "rest")]
    return "| " + " | ".join(cells) + " |"


def exponents(varied: str, found: dict[int, float]) -> str:
    """Return the least-squares slope of log ms over log value, and the last doubling's."""
    x, y = [math.log(value) for value in found], [math.log(ms) for ms in found.values()]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    last = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return f"{varied}: ms grows with exponent {slope:.2f} over {min(found)} to {max(found)}, {last:.2f} at its end"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in BASE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="+", default=[value])
    parser.add_argument("--sparsifier", nargs="+", default=["mutual_choice", "topk", "feature_choice"])
    parser.add_argument("--aux-loss", nargs="+", default=["none"])
    parser.add_argument("--precision", nargs="+", default=["auto"])
    parser.add_argument("--dead", type=float, default=0.0)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--override", nargs="*", default=[], help="more settings of sae-train")
    parser.add_argument("--warm-up", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--json", type=Path, help="append every setting's figures as a line")
    args = parser.parse_args()
    common = {name: getattr(args, name) for name in ("dead", "override", "warm_up", "repeats", "threads")}
    common["train"] = "" if args.train is None else str(args.train)
    names = (*BASE, "sparsifier", "aux_loss", "precision")
    chosen = {name: getattr(args, name) for name in names}
    if args.growth:
        points = [
            {**BASE, varied: value, "sparsifier": args.sparsifier[0], "aux_loss": args.aux_loss[0]}
            | {"precision": args.precision[0], "varied": varied}
            for varied, values in GROWTH.items()
            for value in values
        ]
    else:
        points = [dict(zip(names, values, strict=True)) for values in itertools.product(*chosen.values())]
    heads = ["sparsifier", "aux_loss", "precision", "D", "F", "k", "N", "step ms", "tokens/s", "product ms", "Adam ms"]
    heads += ["step / floor", "GB", *PARTS, "rest"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    growth: dict[str, dict[int, float]] = {}
    for point in points:
        found = measured(point | common)
        print(row(point, found), flush=True)
        if args.json is not None:
            with args.json.open("a") as file:
                file.write(json.dumps(point | common | found) + "\n")
        if "varied" in point:
            growth.setdefault(point["varied"], {})[point[point["varied"]]] = found["ms"]["step"]
    for varied, each in growth.items():
        print(exponents(varied, each))


if __name__ == "__main__":
    sys.exit(main())
