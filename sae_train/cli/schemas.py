"""The classes of config/ as Hydra's schemas. They are under `schema/`, so that they are not shown as choices."""

from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

from hydra.core.config_store import ConfigStore

from sae_train import config as schema
from sae_train.config.sparsifier_registry import SPARSIFIERS

SCHEMAS: dict[str, type] = {
    "run": schema.RunConfig,
    "model": schema.ModelConfig,
    "data": schema.DataConfig,
    "harvest/live": schema.LiveHarvestConfig,
    "harvest/tensors": schema.TensorsHarvestConfig,
    "layer/block": schema.BlockLayerConfig,
    "layer/module": schema.ModuleLayerConfig,
    **{f"sparsifier/{name}": entry.config for name, entry in SPARSIFIERS.items()},
    "budget/pooled": schema.PooledBudgetConfig,
    "budget/uniform": schema.UniformBudgetConfig,
    "budget/zipf": schema.ZipfBudgetConfig,
    "nesting/none": schema.NestingConfig,
    "nesting/matryoshka": schema.MatryoshkaConfig,
    "parametrisation": schema.ParametrisationConfig,
    "aux_loss/none": schema.NoAuxLossConfig,
    "aux_loss/aux_k": schema.AuxKConfig,
    "aux_loss/aux_zipf": schema.AuxZipfConfig,
    "optimizer": schema.OptimizerConfig,
    "checkpoint": schema.CheckpointConfig,
    "parallel/plain": schema.ParallelConfig,
    "parallel/mesh": schema.MeshConfig,
    "plan": schema.PlanConfig,
    "tracking/none": schema.TrackingConfig,
    "tracking/wandb": schema.WandbConfig,
}
"""Class by path: files in `conf/` name it as `schema/<path>`."""


DIALS = [name for name, hint in get_type_hints(schema.RunConfig).items() if not is_dataclass(hint)]
"""The keys that belong to no group."""


def keys_of_an_sae() -> list[str]:
    """Return every dial, group and dotted key that belongs to an SAE, under any choice of the groups."""
    own = [field.name for field in fields(schema.SaeConfig)]
    dotted = {
        f"{group}.{field.name}": None
        for path, owner in SCHEMAS.items()
        if (group := path.partition("/")[0]) in own
        for field in fields(owner)
    }
    return [*own, *dotted]


def register_schemas() -> None:
    """Register the classes of config/ with Hydra. It may be called again."""
    store = ConfigStore.instance()
    for path, node in SCHEMAS.items():
        *group, name = f"schema/{path}".split("/")
        store.store(group="/".join(group), name=name, node=node)


def holds_text(key: str) -> bool:
    """Return whether any choice of the key's group has text under this key."""
    group, _, field = key.rpartition(".")
    owners = [owner for path, owner in SCHEMAS.items() if path.partition("/")[0] == (group or "run")]
    return any(str in (hint, *get_args(hint)) for owner in owners if (hint := get_type_hints(owner).get(field)))
