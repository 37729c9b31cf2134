"""Measure the rates of this machine's CPU, and write them as a YAML file for plan.hardware.

    python scripts/measure_hardware.py --out FILE.yaml [--price 0.10]
    sae-train dry_run=true plan.hardware=FILE.yaml

It takes about ten seconds. Close other programs first. It computes with as many threads as `sae-train` does. The fields
and their units are in conf/hardware.yaml. The price and the link between machines are not measured: give them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_train.ranks.threads import prepare_threads

prepare_threads()  # before torch is loaded

import torch  # noqa: E402

from sae_train import kernels  # noqa: E402
from sae_train.kernels import backend  # noqa: E402
from sae_train.training.memory import available_bytes  # noqa: E402

SECONDS = 0.9
"""Time for each rate."""
TOKENS, WIDTH, FEATURES, K = 2048, 512, 4096, 32
"""A step's sizes."""


def seconds_of(act: Callable[[], Any], within: float) -> float:
    """Return the median seconds of `act`, repeated for about `within` seconds, after two calls that do not count."""
    act()
    act()
    taken: list[float] = []
    while sum(taken) < within or len(taken) < 5:
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def matrix_fp32(within: float) -> float:
    """Return the operations a second of the encoder's product in fp32, whose result stays in the cache."""
    x_ND, W_FD, b_F = torch.randn(TOKENS, 1024), torch.randn(1024, 1024), torch.zeros(1024)
    return 2 * TOKENS * 1024 * 1024 / seconds_of(lambda: kernels.affine(x_ND, W_FD, b_F, precision="float32"), within)


def matrix_bf16(within: float) -> float:
    """Return the operations a second of the product in bf16 that finds candidates."""
    x_ND, W_FD, b_F = torch.randn(TOKENS, 1024), torch.randn(1024, 1024), torch.zeros(1024)
    return 2 * TOKENS * 1024 * 1024 / seconds_of(lambda: kernels.approximate(x_ND, W_FD, b_F), within)


def memory(within: float) -> float:
    """Return the bytes a second of a pass of Adam over matrices that no cache holds."""
    n, halted = 8_000_000, torch.tensor(False)
    weight, gradient, mean, square = (torch.ones(n) for _ in range(4))
    rates: dict[str, Any] = {"scale": None, "halted": halted, "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    steps = [torch.zeros(())]
    return 28 * n / seconds_of(lambda: kernels.adam([weight], [gradient], [mean], [square], steps, **rates), within)


def scan(within: float) -> float:
    """Return the bytes a second of a pass over pre-activations that takes maxima of groups of 8."""
    pre_NF = torch.randn(TOKENS, FEATURES)
    return 4 * pre_NF.numel() / seconds_of(lambda: torch.nn.functional.max_pool1d(pre_NF, 8), within)


def gather(within: float) -> float:
    """Return the bytes a second of rows that a step's reconstruction reads."""
    W_FD, n_matches = torch.randn(FEATURES, WIDTH), TOKENS * K
    feature_M, value_M = torch.randint(FEATURES, (n_matches,), dtype=torch.int32), torch.rand(n_matches)
    start_N = torch.arange(0, n_matches + 1, K, dtype=torch.int32)
    token_M = torch.arange(TOKENS, dtype=torch.int32).repeat_interleave(K)
    return (
        4 * WIDTH * n_matches / seconds_of(lambda: kernels.decode(value_M, W_FD, feature_M, token_M, start_N), within)
    )


def order(within: float) -> float:
    """Return the numbers a second of which the third that is largest is taken, and which are sorted."""
    values, features = torch.randn(3 * TOKENS * K), torch.randint(FEATURES, (TOKENS * K,), dtype=torch.int32)
    both = seconds_of(lambda: (values.topk(TOKENS * K, sorted=False), features.sort(stable=True)), within)
    return (len(values) + len(features)) / both


def lists(within: float) -> float:
    """Return the numbers a second of lists of matches: the mean of a comparison, a choice, a gather and a sum."""
    values, index = torch.randn(TOKENS * K), torch.randperm(TOKENS * K)

    def act() -> None:
        keep = values > 0
        torch.where(keep, index, 0)
        index.index_select(0, index)
        keep.sum()

    return 4 * len(values) / seconds_of(act, within)


def fresh(within: float) -> float:
    """Return the bytes a second of memory that the system hands out, page by page, and takes back."""
    n = 12_000_000  # 48 MB, which glibc does not keep
    return 4 * n / seconds_of(lambda: torch.zeros(n), within)


def call(within: float) -> float:
    """Return the seconds of an operation on a few numbers."""
    few = torch.ones(8)

    def act() -> None:
        for _ in range(1000):
            few.add(1)

    return seconds_of(act, within) / 1000


MEASURED: dict[str, Callable[[float], float]] = {
    "matrix_bf16": matrix_bf16,
    "matrix_fp32": matrix_fp32,
    "memory": memory,
    "scan": scan,
    "gather": gather,
    "order": order,
    "list": lists,
    "fresh": fresh,
    "call": call,
}
"""How each field of conf/hardware.yaml is measured."""


def measure(
    *, price: float, link: float, within: float = SECONDS, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Return the fields of this machine's CPU.

    Args:
        price, link: fields that are not measured.
        within: seconds for each rate.
        say: called with a line for each rate once it is measured.
    """
    found: dict[str, Any] = {"kind": "cpu"}
    with torch.no_grad():
        for name, rate in MEASURED.items():
            found[name] = float(f"{rate(within):.3g}")
            say(f"{name}: {found[name]:.3g}")
    precision = "bf16" if backend.has_bf16(torch.device("cpu")) else "float32"
    return found | {
        "matrix_share": 1.0,
        "memory_share": 1.0,
        "link": link,
        "memory_bytes": float(available_bytes()),
        "price": price,
        "auto_precision": precision,
    }


def as_yaml(found: dict[str, Any]) -> str:
    """Return the fields as YAML. Rates have a point and a sign, because YAML reads 1e9 as text."""
    lines = [
        f"{name}: {value}" if isinstance(value, str) else f"{name}: {_number(value)}" for name, value in found.items()
    ]
    return "\n".join(["# Written by scripts/measure_hardware.py; conf/hardware.yaml has the units.", *lines]) + "\n"


def _number(value: float) -> str:
    return f"{value:g}" if 1e-3 < value < 1e4 or value == 0 else f"{value:.4e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="YAML file to write")
    parser.add_argument("--price", type=float, default=0.10, help="US dollars an hour. Default: 0.10")
    parser.add_argument("--link", type=float, default=1e9, help="bytes a second between ranks. Default: 1e9, assumed")
    args = parser.parse_args()
    print(f"measuring with {torch.get_num_threads()} threads", flush=True)
    found = measure(price=args.price, link=args.link)
    args.out.write_text(as_yaml(found), encoding="utf-8")
    print(f"written: {args.out}. Predict with: sae-train dry_run=true plan.hardware={args.out}")


if __name__ == "__main__":
    sys.exit(main())
