"""What every source of activations offers to training.

Letters: N tokens in a batch, D d_model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_train.config import LaneSizes, LiveHarvestConfig, RunConfig
from sae_train.harvest.held_out import HeldOut
from sae_train.harvest.scaling import Scaling
from sae_train.phases import SILENT, Phases

if TYPE_CHECKING:
    from sae_train.harvest.corpus import Corpus
    from sae_train.harvest.language_model import LanguageModel

FILES_PREFETCH = 2
"""Batches that are read ahead from files with a GPU, where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFacts:
    """What is known of a stream before weights are loaded or activations read."""

    d_model: int
    label: str
    """Where activations come from, for the run's name: 'bundled.residual2', or 'tensors'."""
    n_blocks: int | None
    """Blocks of the language model; None without one."""
    pool_bytes: int
    """Memory of all lanes' pools and calibration tokens, over all ranks."""
    flops_per_token: int
    """Floating-point operations of the language model's weight products, see `SiteFacts`; 0 without one."""
    prefetch: int = 0
    """Batches that may be harvested ahead of the step."""
    ahead_bytes: int = 0
    """Memory of what may be harvested ahead, over all ranks."""
    logit_bytes: int = 0
    """Memory that the loss and the way back through the logits take of one rank at most; 0 where nothing needs them."""
    whole_flops_per_token: int = 0
    """Operations of the language model's whole forward pass for one token; 0 without one, or without a loss."""
    notices: tuple[str, ...] = ()
    """What the user should be told of the data, a line each; the stream says it again once it has begun."""
    note: str = ""
    """What the user should be told of the language model."""
    corpus: "Corpus | None" = None
    """Local text, which was opened to check it; the run reads on from it."""
    sizes: LaneSizes | None = None
    """Lanes, contexts a forward pass and pools of a live harvest."""
    record: dict[str, str | int | None] = field(default_factory=dict)
    """What sae.json should say of the source: model id, revision, site, data."""


class Stream(ABC):
    """Batches of normalised activations, a function of the config alone, whatever the ranks.

    Attributes:
        d_model: width of the activations.
        scaling: set by `start` or `restore`.
        language_model: None when activations are read from files.
        held_out: activations that are never trained on.
    """

    d_model: int
    scaling: Scaling
    language_model: "LanguageModel | None"
    held_out: HeldOut

    @abstractmethod
    def start(self, phases: Phases = SILENT) -> None:
        """Begin a fresh run: fix the scaling and fill the pools. Collective."""

    @abstractmethod
    def batch(self, step: int) -> Tensor:
        """Return [N / ranks, W]: this rank's rows of `step`'s batch, normalised. Steps are asked for in order.

        A row is an activation, W = D; where the run reads gradients its gradient stands behind it, W = 2 D.
        """

    def fill(self, phases: Phases = SILENT) -> None:  # noqa: B027 (most have nothing to fill)
        """Harvest what the next batch needs; `batch` does what was not done.

        `phases` may end this in the middle. The stream's state then leads to the same batches.
        """

    def fills_soon(self) -> bool:
        """Return whether one of the next two batches may have to be harvested by this rank first."""
        return False

    @abstractmethod
    def fingerprint(self) -> list[int]:
        """Return numbers that tell what this process reads from anything else; before `start`, too."""

    @abstractmethod
    def replicated_state(self) -> dict[str, Tensor]:
        """Return what all ranks share, as CPU tensors."""

    @abstractmethod
    def lane_states(self) -> dict[int, dict[str, Tensor]]:
        """Return the state of each lane that this rank owns, as CPU tensors; empty where there are no lanes."""

    @abstractmethod
    def restore(self, replicated: dict[str, Tensor], lane_state: Callable[[int], dict[str, Tensor]]) -> None:
        """Go on from saved state, on any number of ranks; `lane_state` reads one lane's."""

    def notices(self) -> list[str]:
        """Return a line for each thing that is wrong with the data. Collective; call it once the stream has begun."""
        return []

    def data_figures(self) -> dict[str, int]:
        """Return counts of what was wrong with the data, over all ranks; for the summary. Collective."""
        return {}

    def figures(self) -> dict[str, float]:
        """Return the `data/` figures of a row of metrics, over all ranks. Collective."""
        return {}

    @abstractmethod
    def dropped_share(self) -> float:
        """Return the share of tokens that the outlier limit left out so far, over all ranks. Collective."""

    def quiet(self) -> AbstractContextManager[None]:
        """Return a context in which nothing harvests ahead, for what else uses language model or tokenizer."""
        return nullcontext()

    def beside_seconds(self) -> float:
        """Return how long activations were harvested so far while no caller of `batch` waited for them."""
        return 0.0

    def close(self) -> None:  # noqa: B027 (most hold nothing open)
        """Let go of files and memory."""


def run_dtype(precision: str) -> torch.dtype:
    """Return the number format of pools and batches: float64 when everything is, else fp32."""
    return torch.float64 if precision == "float64" else torch.float32


def row_width(config: RunConfig, d_model: int) -> int:
    """Return how many numbers go through the stream for a token."""
    return 2 * d_model if config.reads_gradients else d_model


def prefetch_of(config: RunConfig) -> int:
    """Return how many batches may be harvested ahead; where the configuration leaves it open by rule.

    With a GPU files are read a few batches ahead, and a language model is half a pool ahead, which is what a refill
    takes: text and launches hide behind the device. Without one all that would only take the step's cores
    (docs/metrics.md).
    """
    given = config.harvest.prefetch
    if given is not None:
        return given
    if not torch.cuda.is_available():
        return 0
    return config.lane_sizes.pool_batches // 2 if isinstance(config.harvest, LiveHarvestConfig) else FILES_PREFETCH


def whole_batches(config: RunConfig) -> int:
    """Return how many tokens a run reads: `tokens`, rounded up to whole batches."""
    return -(-config.tokens // config.batch_tokens) * config.batch_tokens
