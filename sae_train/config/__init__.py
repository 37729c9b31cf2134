"""The typed configuration: every setting, its unit, its range, and the checks that need no model.

Values live in `conf/`. These classes hold types, ranges and one help line a field, and they are never changed after
loading. A field that is `null` is set by the rule in its help line.

Where settings are checked:

| check | home |
|---|---|
| a typed word: unknown key or choice, wrong type, repeats | `cli/overrides.py` |
| an entry of `variants` or `grid` | `cli/entries.py` |
| a rule between the SAEs of a run | `cli/suite.py` |
| a typed setting that this run never reads | `cli/never_read.py` |
| the settings of a launcher | `cli/launcher.py` |
| the range of one field | `Range` at the field; `ranges.py` checks all |
| a rule between fields of one group | `conflicts` of the group's class |
| a rule between groups | `RunConfig.conflicts` |
| the width against k, memory, disk | `training/plan.py` |
| a budget that the sizes of the SAE cannot meet | `problems` of the sparsifier |
| the number of ranks in a layout | `ranks/layout.py` |
| the language model, text and files | `check_stream` in `harvest/build.py` |
"""

from sae_train.config.auxiliary import AuxKConfig, AuxLossConfig, AuxZipfConfig, NoAuxLossConfig
from sae_train.config.budget import BudgetConfig, PooledBudgetConfig, UniformBudgetConfig, ZipfBudgetConfig
from sae_train.config.dictionary import MatryoshkaConfig, NestingConfig, ParametrisationConfig
from sae_train.config.execution import (
    CheckpointConfig,
    MeshConfig,
    ParallelConfig,
    PlanConfig,
    TrackingConfig,
    WandbConfig,
)
from sae_train.config.harvest import (
    BlockLayerConfig,
    DataConfig,
    HarvestConfig,
    LayerConfig,
    LiveHarvestConfig,
    ModelConfig,
    ModuleLayerConfig,
    TensorsHarvestConfig,
)
from sae_train.config.identity import as_dict, differing, identity, identity_digest
from sae_train.config.lanes import LaneSizes
from sae_train.config.optimizer import OptimizerConfig
from sae_train.config.run import RunConfig
from sae_train.config.sae import SaeConfig
from sae_train.config.source import SourceConfig
from sae_train.config.sparsifiers import (
    AllocatorConfig,
    FeatureChoiceConfig,
    GatedConfig,
    GradientConfig,
    JumpReLUConfig,
    MutualChoiceConfig,
    PAnnealConfig,
    PenalisedConfig,
    ReLUConfig,
    SparsifierConfig,
    TemporalMaskConfig,
    TopKConfig,
)

__all__ = [
    "AllocatorConfig",
    "AuxKConfig",
    "AuxLossConfig",
    "AuxZipfConfig",
    "BlockLayerConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "DataConfig",
    "FeatureChoiceConfig",
    "GatedConfig",
    "GradientConfig",
    "HarvestConfig",
    "JumpReLUConfig",
    "LaneSizes",
    "LayerConfig",
    "LiveHarvestConfig",
    "MatryoshkaConfig",
    "MeshConfig",
    "ModelConfig",
    "ModuleLayerConfig",
    "MutualChoiceConfig",
    "NestingConfig",
    "NoAuxLossConfig",
    "OptimizerConfig",
    "PAnnealConfig",
    "ParallelConfig",
    "ParametrisationConfig",
    "PenalisedConfig",
    "PlanConfig",
    "PooledBudgetConfig",
    "ReLUConfig",
    "RunConfig",
    "SaeConfig",
    "SourceConfig",
    "SparsifierConfig",
    "TemporalMaskConfig",
    "TensorsHarvestConfig",
    "TopKConfig",
    "TrackingConfig",
    "UniformBudgetConfig",
    "WandbConfig",
    "ZipfBudgetConfig",
    "as_dict",
    "differing",
    "identity",
    "identity_digest",
]
