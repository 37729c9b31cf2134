"""Parts that several tests share: a configuration by hand, and oracles by sorting."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from sae_train import config as schema
from sae_train.config import OptimizerConfig, RunConfig
from sae_train.config.sparsifier_registry import SPARSIFIERS

T = TypeVar("T")
CONF = Path(__file__).resolve().parents[2] / "conf"
CPU = torch.device("cpu")


def run_config(
    *,
    sparsifier: str = "mutual_choice",
    after: float = 0.0,
    multi_weight: float = 0.0,
    budget: str | None = None,
    aux: str = "none",
    start_k: float | None = None,
    anneal: float = 0.0,
    exponent: float | None = 1.0,
    shift: float | None = None,
    cap: float | None = None,
    floor: float | None = None,
    tau: float = 0.5,
    hard: bool = False,
    weight: float = 1 / 32,
    beta: float = 1.0,
    prefixes: list[float] | None = None,
    parametrisation: str = "free",
    **dials: Any,
) -> RunConfig:
    """Return a whole configuration; `dials` are RunConfig's own fields."""
    sparsifiers: dict[str, Callable[[], schema.SparsifierConfig]] = {
        "topk": lambda: schema.TopKConfig(name="topk", revival=1.0, multi_weight=multi_weight),
        "gradient": lambda: schema.GradientConfig(name="gradient", revival=1.0, beta=beta, multi_weight=multi_weight),
        "feature_choice": lambda: schema.FeatureChoiceConfig(name="feature_choice", revival=1.0, after=after),
    }
    ramp: dict[str, Any] = {"start_k": start_k, "anneal": anneal}
    zipf: dict[str, Any] = {"exponent": exponent, "shift": shift, "cap": cap, "floor": floor, "zipf_from": None}
    budgets: dict[str, Callable[[], schema.BudgetConfig]] = {
        "pooled": lambda: schema.PooledBudgetConfig(name="pooled", **ramp),
        "uniform": lambda: schema.UniformBudgetConfig(name="uniform", **ramp),
        "zipf": lambda: schema.ZipfBudgetConfig(name="zipf", **ramp, **zipf),
    }
    losses: dict[str, Callable[[], schema.AuxLossConfig]] = {
        "none": lambda: schema.NoAuxLossConfig(name="none"),
        "aux_k": lambda: schema.AuxKConfig(name="aux_k", weight=weight),
        "aux_zipf": lambda: schema.AuxZipfConfig(
            name="aux_zipf", weight=weight, tau=tau, hard=hard, exponent=exponent or 0.0, shift=shift
        ),
    }
    nesting: schema.NestingConfig = schema.NestingConfig(name="none")
    if prefixes is not None:
        nesting = schema.MatryoshkaConfig(name="matryoshka", prefixes=prefixes)
    budget = budget or ("uniform" if sparsifier == "feature_choice" else "pooled")
    settings: dict[str, Any] = {
        "k": 4.0, "expansion": 4, "n_features": None, "tokens": 4096, "batch_tokens": 64, "seed": 0,
        "dead_window": None, "precision": "float32", "evaluation_tokens": 1024, "evaluate_every": 0,
        "log_every": 1024, "name": None, "runs": "runs", "dry_run": False, "variants": None,
        "grid": None,
    }  # fmt: skip
    return RunConfig(
        **settings | dials,
        model=schema.ModelConfig(
            name="m", id="bundled", revision=None, dtype="float32", attention="sdpa", remote_code=False
        ),
        data=schema.DataConfig(
            name="d",
            id="bundled",
            subset=None,
            split="train",
            held_out_split=None,
            text_column="text",
            seed=0,
            repeat=True,
            strict=False,
        ),
        harvest=schema.HarvestConfig(source="live", calibration_tokens=1024, prefetch=0),
        layer=schema.BlockLayerConfig(kind="residual", index="middle"),
        sparsifier=sparsifiers.get(sparsifier, lambda: defaults_of(sparsifier))(),
        budget=budgets[budget](),
        nesting=nesting,
        parametrisation=schema.ParametrisationConfig(name=parametrisation),
        aux_loss=losses[aux](),
        optimizer=schema.OptimizerConfig(
            name="adam",
            lr=None,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            clip=1.0,
            warmup_tokens=None,
            decay_tokens=None,
        ),
        checkpoint=schema.CheckpointConfig(every_tokens=None, keep=2, beside=None),
        parallel=schema.ParallelConfig(layout="data"),
        tracking=schema.TrackingConfig(name="none"),
        plan=schema.PlanConfig(hardware=None, devices=None),
    )


def identity_of(config: RunConfig) -> dict[str, Any]:
    """Return the identity of a run of one SAE."""
    return schema.identity(config, {"sae": config.sae})


def defaults_of(name: str) -> schema.SparsifierConfig:
    """Return the settings of a sparsifier as `conf/` has them; of an unknown one, those of mutual_choice."""
    if name not in SPARSIFIERS:
        return schema.MutualChoiceConfig(name=name, revival=1.0)
    values = yaml.safe_load((CONF / "sparsifier" / f"{name}.yaml").read_text(encoding="utf-8"))
    return SPARSIFIERS[name].config(**{key: value for key, value in values.items() if key != "defaults"})


def kept_by_sorting(pre_NF: Tensor, *, group: str, budgets: list[int]) -> set[tuple[int, int]]:
    """Return the (token, feature) pairs that each batch, row or column keeps, the slow and obvious way."""
    entries: dict[int, list[tuple[float, int, int]]] = {}
    for token, row in enumerate(pre_NF.tolist()):
        for feature, value in enumerate(row):
            if value > 0:
                which = {"batch": 0, "row": token, "column": feature}[group]
                entries.setdefault(which, []).append((-value, token, feature))
    return {(t, f) for which, some in entries.items() for _, t, f in sorted(some)[: budgets[which]]}


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Compute with `n` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def schema_of(*, clip: float = 0.0) -> OptimizerConfig:
    return OptimizerConfig(
        name="adam", lr=None, beta1=0.9, beta2=0.99, eps=1e-8, clip=clip, warmup_tokens=None,
        decay_tokens=None,
    )  # fmt: skip
