"""The interface between a source of activations and training. Letters: N tokens in a batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.config import LaneSizes
from sae_train.config.harvest import LayerConfig
from sae_train.config.source import SourceConfig
from sae_train.harvest.batch import Batch
from sae_train.harvest.held_out import HeldOut
from sae_train.harvest.meter import Meter
from sae_train.harvest.scaling import Scaling
from sae_train.phases import SILENT, Phases

if TYPE_CHECKING:
    from sae_train.harvest.language_model import LanguageModel
    from sae_train.harvest.live_checks import LiveParts
    from sae_train.harvest.row_plan import RowPlan

FILES_PREFETCH = 2
"""Batches that are read ahead from files on a GPU, where harvest.prefetch is null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSite:
    """A site whose activations a stream gives. `check_stream` makes it; the plan and exports read it."""

    label: str
    """'residual2', 'module.transformer.h.1.mlp', or 'tensors'. It is unique in a stream, whose dictionaries use it."""
    d_model: int
    """Width of the activations."""
    layer: LayerConfig | None
    """The setting of this one site: as typed, or with the index of a block of 'all' or 'every=N'. None for tensors."""
    record: dict[str, str | int | None]
    """The site's own entries in sae.json: site, module, side. Empty for tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFacts:
    """The facts of a stream before weights are loaded or activations read. Numbers of bytes are sums over its sites.

    `check_stream` makes it. The plan reads it, and `build_stream` continues with its `opened`.
    """

    sites: tuple[StreamSite, ...]
    """The sites, each once, in order of first use."""
    layers: tuple[tuple[LayerConfig, tuple[StreamSite, ...]], ...] = ()
    """Each setting `layer` with the sites that it means. Empty for tensors."""
    name: str
    """Source of the activations, for the run's name: the model's short name, or 'tensors'."""
    pool_bytes: int
    """Memory of all lanes' pools and calibration tokens, over all ranks."""
    flops_per_token: int
    """Floating-point operations of the language model's weight products, see `ModelFacts`. 0 without one."""
    model_bytes: int = 0
    """Memory of the language model's weights on one rank, in `model.dtype`. 0 without one."""
    pool_batch_bytes: int = 0
    """Memory of one batch in the pools, over all ranks. 0 without pools."""
    prefetch: int = 0
    """Batches that may be harvested ahead of the step."""
    ahead_bytes: int = 0
    """Memory of the rows that may be harvested ahead, over all ranks."""
    logit_bytes: int = 0
    """Peak memory of one rank for the loss and its backward pass through the logits. 0 without gradients."""
    whole_flops_per_token: int = 0
    """Operations of the language model's whole forward pass for one token. 0 without one, or without a loss."""
    notices: tuple[str, ...] = ()
    """Lines for the user about the data. The stream repeats them once it has begun."""
    note: str = ""
    """A line for the user about the language model."""
    sizes: LaneSizes | None = None
    """Lanes, contexts a forward pass and pools of a live harvest."""
    record: dict[str, str | int | None] = field(default_factory=dict)
    """The entries in sae.json that all sites share: model id, revision, data."""
    opened: "LiveParts | RowPlan | None" = field(default=None, repr=False)
    """Text, tokenizer and model, or headers of files, which were opened for the checks."""

    def sites_of(self, layer: LayerConfig) -> tuple[StreamSite, ...]:
        """Return the sites that a setting means: one, or several for 'all' and 'every=N'. Tensors have one for any.

        Args:
            layer: a setting that the stream was checked with, or the setting of one of its sites.
        """
        if not self.layers:
            return self.sites
        for known, sites in self.layers:
            if known == layer:
                return sites
        return next((site,) for _, sites in self.layers for site in sites if site.layer == layer)


class Stream(ABC):
    """Batches of normalised activations. They depend on the settings alone, not on the number of ranks.

    `build_stream` creates one, and the trainer reads it.

    Attributes:
        scalings: the scaling of each site by its label. `start` or `restore` sets them.
        language_model: None when activations are read from files.
        held_out: activations that are never trained on.
        meter: seconds and tokens of the parts of the run.
        data_revision: commit of the text on the Hub. None for other data. It is no part of the run's identity.
    """

    meter: Meter
    scalings: dict[str, Scaling]
    language_model: "LanguageModel | None"
    held_out: HeldOut
    data_revision: str | None = None

    @abstractmethod
    def start(self, phases: Phases = SILENT) -> None:
        """Begin a fresh run: fix the scaling and fill the pools. Collective."""

    @abstractmethod
    def batch(self, step: int) -> dict[str, Batch]:
        """Return this rank's N / ranks rows of `step`'s batch at each site, by label. The caller reads steps in order.

        The same row of every site is the same token, unless a row over a site's outlier limit was replaced.
        """

    def fill(self, phases: Phases = SILENT) -> None:  # noqa: B027 (most have nothing to fill)
        """Harvest the rows that the next batch needs. `batch` harvests those that are still missing.

        `phases` may end this at any point. The stream's state then leads to the same batches.
        """

    def fills_soon(self) -> bool:
        """Return whether this rank may have to harvest before one of the next two batches."""
        return False

    @abstractmethod
    def fingerprint(self) -> list[int]:
        """Return numbers that identify the data that this process reads. Also works before `start`."""

    @abstractmethod
    def replicated_state(self) -> dict[str, Tensor]:
        """Return the state that all ranks share, as CPU tensors."""

    @abstractmethod
    def lane_states(self) -> dict[int, dict[str, Tensor]]:
        """Return the state of each lane that this rank owns, as CPU tensors. Empty where there are no lanes."""

    @abstractmethod
    def restore(self, replicated: dict[str, Tensor], lane_state: Callable[[int], dict[str, Tensor]]) -> None:
        """Continue from saved state, on any number of ranks.

        Args:
            replicated: a result of `replicated_state`.
            lane_state: reads the state of one lane.
        """

    def notices(self) -> list[str]:
        """Return a line for each kind of flaw in the data. Collective; call it once the stream has begun."""
        return []

    def data_figures(self) -> dict[str, int]:
        """Return counts of flaws in the data over all ranks, for the summary. Collective."""
        return {}

    def figures(self) -> dict[str, float]:
        """Return the `data/` figures of a row of metrics, over all ranks. Collective."""
        return {}

    @abstractmethod
    def dropped_shares(self) -> dict[str, float]:
        """Return the share of rows over each site's outlier limit so far, over all ranks. Collective.

        A language model's rows over the limit are replaced, and rows of files are left out.
        """

    def quiet(self) -> AbstractContextManager[None]:
        """Return a context in which nothing is harvested ahead. Other users of the language model enter it."""
        return nullcontext()

    def beside_seconds(self) -> float:
        """Return the seconds of harvesting so far during which no caller of `batch` waited."""
        return 0.0

    def close(self) -> None:  # noqa: B027 (most hold nothing open)
        """Release files and memory."""


def run_dtype(precision: str) -> torch.dtype:
    """Return the number format of pools and batches: float64 under precision=float64, else float32."""
    return torch.float64 if precision == "float64" else torch.float32


def row_bytes(source: SourceConfig, d_model: int) -> int:
    """Return the bytes of one token in pools and batches, its gradient included."""
    return d_model * source.element_size * (2 if source.reads_gradients else 1)


def prefetch_of(source: SourceConfig) -> int:
    """Return the number of batches that may be harvested ahead, by this rule where the configuration gives none.

    On a GPU files are read a few batches ahead, and a language model runs half a pool ahead, the size of a refill. Text
    and launches then overlap with the device's work. Without a GPU, prefetching would only take cores from the step.
    """
    if source.harvest.prefetch is not None:
        return source.harvest.prefetch
    if not torch.cuda.is_available():
        return 0
    return source.lane_sizes.pool_batches // 2 if source.harvest.runs_model else FILES_PREFETCH


def whole_batches(source: SourceConfig) -> int:
    """Return the number of tokens that a run reads: `tokens`, rounded up to whole batches."""
    return -(-source.tokens // source.batch_tokens) * source.batch_tokens
