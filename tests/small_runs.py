"""Parts that several tests share: a configuration by hand, oracles by sorting, and ranks that are threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from sae_train import config as schema
from sae_train.config import RunConfig
from sae_train.ranks import Ranks, Solo

T = TypeVar("T")
CPU = torch.device("cpu")


def run_config(
    *,
    sparsifier: str = "mutual_choice",
    after: float = 0.0,
    budget: str | None = None,
    aux: str = "none",
    start_k: float | None = None,
    anneal: float = 0.0,
    exponent: float = 1.0,
    shift: float | None = None,
    cap: float | None = None,
    floor: float | None = None,
    tau: float = 0.5,
    hard: bool = False,
    weight: float = 1 / 32,
    **dials: Any,
) -> RunConfig:
    """Return a whole configuration; `dials` are RunConfig's own fields."""
    sparsifiers: dict[str, Callable[[], schema.SparsifierConfig]] = {
        "topk": lambda: schema.TopKConfig(name="topk"),
        "feature_choice": lambda: schema.FeatureChoiceConfig(name="feature_choice", after=after),
    }
    ramp: dict[str, Any] = {"start_k": start_k, "anneal": anneal}
    zipf: dict[str, Any] = {"exponent": exponent, "shift": shift, "cap": cap, "floor": floor}
    budgets: dict[str, Callable[[], schema.BudgetConfig]] = {
        "pooled": lambda: schema.PooledBudgetConfig(name="pooled", **ramp),
        "uniform": lambda: schema.UniformBudgetConfig(name="uniform", **ramp),
        "zipf": lambda: schema.ZipfBudgetConfig(name="zipf", **ramp, **zipf),
    }
    losses: dict[str, Callable[[], schema.AuxLossConfig]] = {
        "none": lambda: schema.NoAuxLossConfig(name="none"),
        "aux_k": lambda: schema.AuxKConfig(name="aux_k", weight=weight),
        "aux_zipf": lambda: schema.AuxZipfConfig(
            name="aux_zipf", weight=weight, tau=tau, hard=hard, exponent=exponent, shift=shift
        ),
    }
    budget = budget or ("uniform" if sparsifier == "feature_choice" else "pooled")
    settings: dict[str, Any] = {
        "k": 4.0, "expansion": 4, "n_features": None, "tokens": 4096, "batch_tokens": 64, "seed": 0,
        "dead_window": None, "precision": "float32", "evaluation_tokens": 1024, "evaluate_every": 0,
        "log_every": 1024, "name": None, "runs": "runs", "dry_run": False,
    }  # fmt: skip
    return RunConfig(
        **settings | dials,
        model=schema.ModelConfig(name="m", id="bundled", revision=None, dtype="float32", attention="sdpa"),
        data=schema.DataConfig(
            name="d",
            id="bundled",
            subset=None,
            split="train",
            held_out_split=None,
            text_column="text",
            seed=0,
            repeat=True,
        ),
        harvest=schema.HarvestConfig(source="live", calibration_tokens=1024),
        layer=schema.BlockLayerConfig(kind="residual", index="middle"),
        sparsifier=sparsifiers.get(sparsifier, lambda: schema.MutualChoiceConfig(name=sparsifier))(),
        budget=budgets[budget](),
        aux_loss=losses[aux](),
        optimizer=schema.OptimizerConfig(
            name="adam", lr=None, beta1=0.9, beta2=0.999, eps=1e-8, clip=1.0, warmup_tokens=None, decay_tokens=None
        ),
        checkpoint=schema.CheckpointConfig(every_tokens=None, keep=2),
        parallel=schema.ParallelConfig(layout="data"),
        tracking=schema.TrackingConfig(name="none"),
    )


def kept_by_sorting(pre_NF: Tensor, *, group: str, budgets: list[int]) -> set[tuple[int, int]]:
    """Return the (token, feature) pairs that each batch, row or column keeps, the slow and obvious way."""
    entries: dict[int, list[tuple[float, int, int]]] = {}
    for token, row in enumerate(pre_NF.tolist()):
        for feature, value in enumerate(row):
            if value > 0:
                which = {"batch": 0, "row": token, "column": feature}[group]
                entries.setdefault(which, []).append((-value, token, feature))
    return {(t, f) for which, some in entries.items() for _, t, f in sorted(some)[: budgets[which]]}


class ThreadRanks(Ranks):
    """Ranks that are threads of this process: the collectives of ranks.py, without starting processes."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.device = rank, size, CPU
        self._board, self._barrier = board, barrier

    def _all(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all(tensor)).sum(0)

    def sum_in_place(self, tensor: Tensor) -> None:
        total = self.sum(tensor)
        self._barrier.wait()
        tensor.copy_(total)

    def max(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all(tensor)).amax(0)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._all(tensor))

    def gather_objects(self, value: Any) -> list[Any]:
        return self._all(value)

    def barrier(self) -> None:
        self._barrier.wait()

    def close(self) -> None:
        return None


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Return what `work` returns on each of `size` ranks, in rank order."""
    if size == 1:
        return [work(Solo())]
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, size, board, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Compute with `n` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
