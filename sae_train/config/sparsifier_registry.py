"""The sparsifiers by name: settings and implementation, one line each. Imports no torch."""

from typing import NamedTuple

from sae_train.config.sparsifiers import (
    FeatureChoiceConfig,
    GatedConfig,
    GradientConfig,
    JumpReLUConfig,
    MutualChoiceConfig,
    PAnnealConfig,
    ReLUConfig,
    SparsifierConfig,
    TemporalMaskConfig,
    TopKConfig,
)


class Entry(NamedTuple):
    """One sparsifier. The command line reads `config`; `sparsifiers.build_sparsifier` imports the implementation."""

    config: type[SparsifierConfig]
    """Class of its settings. `conf/sparsifier/NAME.yaml` holds their values."""
    implementation: str
    """'module:Class' of the Sparsifier."""


SPARSIFIERS: dict[str, Entry] = {
    "topk": Entry(TopKConfig, "sae_train.sparsifiers.topk:TopK"),
    "gradient": Entry(GradientConfig, "sae_train.sparsifiers.gradient:Gradient"),
    "mutual_choice": Entry(MutualChoiceConfig, "sae_train.sparsifiers.mutual_choice:MutualChoice"),
    "feature_choice": Entry(FeatureChoiceConfig, "sae_train.sparsifiers.feature_choice:FeatureChoice"),
    "jumprelu": Entry(JumpReLUConfig, "sae_train.sparsifiers.jumprelu:JumpReLU"),
    "gated": Entry(GatedConfig, "sae_train.sparsifiers.gated:Gated"),
    "relu": Entry(ReLUConfig, "sae_train.sparsifiers.l1:ReLU"),
    "p_anneal": Entry(PAnnealConfig, "sae_train.sparsifiers.l1:PAnneal"),
    "temporal_mask": Entry(TemporalMaskConfig, "sae_train.sparsifiers.temporal_mask:TemporalMask"),
}
