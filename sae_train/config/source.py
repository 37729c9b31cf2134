"""The settings that decide a run's stream of activations, shared by every SAE that learns from it."""

from dataclasses import dataclass

from sae_train.config.harvest import (
    DataConfig,
    HarvestConfig,
    LayerConfig,
    LiveHarvestConfig,
    ModelConfig,
    TensorsHarvestConfig,
)
from sae_train.config.lanes import LaneSizes, lane_sizes

MOST_HELD_OUT_TOKENS = 50_000
TOKENS_PER_HELD_OUT = 16
"""Tokens of training for each held-out token of a half. It holds where `evaluation_tokens` is null."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """The settings of a stream of activations. `RunConfig.source_for` makes it; everything in `harvest/` reads it.

    Each field without a docstring is documented at `RunConfig`, where it is checked.
    """

    model: ModelConfig
    data: DataConfig
    harvest: HarvestConfig
    layers: tuple[LayerConfig, ...]
    """The distinct settings `layer` of the run's SAEs, in order of first use."""
    tokens: int
    batch_tokens: int
    precision: str
    evaluation_tokens: int | None
    evaluate_every: int
    log_every: int
    reads_gradients: bool
    """Whether each activation comes with its gradient of the language model's loss."""

    @property
    def held_out_tokens(self) -> int:
        """`evaluation_tokens`, or the number that the rule gives where it is null."""
        if self.evaluation_tokens is not None:
            return self.evaluation_tokens
        return max(2 * self.harvest.held_out_unit, min(MOST_HELD_OUT_TOKENS, self.tokens // TOKENS_PER_HELD_OUT))

    @property
    def lane_sizes(self) -> LaneSizes:
        """The sizes of a live harvest, without any null."""
        return lane_sizes(self.live, batch_tokens=self.batch_tokens)

    @property
    def live(self) -> LiveHarvestConfig:
        """The settings of `harvest=live`; call it only where `harvest.runs_model`."""
        assert isinstance(self.harvest, LiveHarvestConfig)
        return self.harvest

    @property
    def tensors(self) -> TensorsHarvestConfig:
        """The settings of `harvest=tensors`; call it only where not `harvest.runs_model`."""
        assert isinstance(self.harvest, TensorsHarvestConfig)
        return self.harvest

    @property
    def element_size(self) -> int:
        """Bytes of one number of a batch: activations are float32, or float64 under `precision=float64`."""
        return 8 if self.precision == "float64" else 4
