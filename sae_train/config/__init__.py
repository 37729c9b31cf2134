"""The typed configuration: what can be set, its unit, and the checks that need no model.

Values live in `conf/`; these classes hold types, one line of documentation a field, and cross-field checks.
They are never changed after loading. `null` means: the rule named in the field's line decides.
"""

from sae_train.config.budget import BudgetConfig, PooledBudgetConfig, UniformBudgetConfig, ZipfBudgetConfig
from sae_train.config.dictionary import MatryoshkaConfig, NestingConfig, ParametrisationConfig
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
from sae_train.config.lanes import LaneSizes
from sae_train.config.run import RunConfig, as_dict, identity, identity_digest
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
from sae_train.config.training import (
    AuxKConfig,
    AuxLossConfig,
    AuxZipfConfig,
    CheckpointConfig,
    MeshConfig,
    NoAuxLossConfig,
    OptimizerConfig,
    ParallelConfig,
    TrackingConfig,
    WandbConfig,
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
    "identity",
    "identity_digest",
]
