"""What every sparsifier is: how the pre-activations of a batch become a code."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from sae_train.config import AllocatorConfig, RunConfig
from sae_train.errors import raise_all
from sae_train.kernels import Matches, PreActivations
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder

SILENT_SHARE, SILENT_GAPS = 4, 20
"""A feature is silent that has not fired for a quarter of what makes it dead, and for twenty times the mean gap between
an allocator's firings of a feature: where those are few most features are silent for so long now and then."""


class Sparsifier(ABC):
    """Decides which features of a token fire; their mean number a token is k, over all that the ranks hold together.

    Attributes:
        inference: rule of the exported autoencoder, 'threshold' or 'topk'.
        cure: what else may help where no feature fires any more, for a message.
        kept_a_token: matches of a token that it selects at most, or is to come to, on average; infinite where it reads
            all pre-activations, which are not screened then.
    """

    inference: str
    cure = ""
    kept_a_token = math.inf

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        budget = config.budget
        self.n_features = n_features
        self.k = config.usual_k
        self.start_k = self.k if budget.start_k is None else budget.start_k
        self.anneal = budget.anneal if budget.start_k is not None else 0.0
        raise_all(self.problems(config))

    def problems(self, config: RunConfig) -> list[str]:
        """Return what is wrong now that the dictionary's width is known."""
        return [
            f"{key}={value:g}: above n_features={self.n_features}. Lower it or raise n_features."
            for key, value in (("k", self.k), ("budget.start_k", self.start_k))
            if value > self.n_features and (key == "k" or value != self.k)
        ]

    def equip(self, dictionary: TrainableAutoencoder, *, dead_window: int) -> None:  # noqa: B027 (most learn none)
        """Give the dictionary the parameters [F] that this sparsifier learns, a value for each of its features.

        Args:
            dead_window: tokens without firing after which a feature is dead.
        """

    def prepare(self, dictionary: TrainableAutoencoder, *, halted: Tensor) -> None:  # noqa: B027 (most do nothing)
        """Do what is to be done to the dictionary before a step's pre-activations are computed.

        Args:
            halted: scalar bool on the device; where true nothing may change any more.
        """

    def revive(  # noqa: B027 (most need no help)
        self, dictionary: TrainableAutoencoder, *, firing: Firing, lost_rate: float, halted: Tensor
    ) -> None:
        """Help silent features after a step.

        Args:
            dictionary: whose parameters may be moved, with no graph.
            firing: counters of the steps up to this one, of this rank's features.
            lost_rate: what the learning rate has lost to its decay.
            halted: scalar bool on the device; where true nothing may change any more.
        """

    def heed(self, slope_NF: Tensor) -> None:
        """Take how fast the language model's loss changes with each feature of each token into the next `encode`.

        Called where the configuration asks for gradients, and only there.

        Args:
            slope_NF: `TrainableAutoencoder.slopes` of this rank's tokens and features; may be written to.
        """
        raise TypeError(f"{type(self).__name__} does not ask for gradients")

    def is_settling(self, info: StepInfo) -> bool:
        """Return whether no feature may have fired yet without this being the end."""
        return False

    def rates(self) -> dict[str, float]:
        """Return the learning rates of these parameters by name, as a share of the others'."""
        return {}

    def k_at(self, info: StepInfo) -> float:
        """Return the mean number of matches a token at this step: from start_k linearly to k."""
        ramp = self.anneal * info.total_tokens
        if info.tokens >= ramp:
            return self.k
        return self.start_k + (self.k - self.start_k) * info.tokens / ramp

    @abstractmethod
    def encode(
        self,
        dictionary: TrainableAutoencoder,
        x_ND: Tensor,
        pre_NF: PreActivations,
        *,
        info: StepInfo,
        firing: Firing,
        ranks: Ranks,
    ) -> tuple[Code, Tensor | None]:
        """Return the differentiable code of this rank's tokens and features, and its share of a penalty, if any.

        Args:
            dictionary: what the gradients are for.
            x_ND: normalised activations that this rank holds; every rank holds equally many tokens.
            pre_NF: their pre-activations, detached; screened only for a finite `kept_a_token`.
            info: where in the run.
            firing: counters of the steps before this one, of this rank's features.
            ranks: who holds the batch's other tokens, and the other features.
        """

    def kept(self, code: Code) -> Code:
        """Return what of a step's code, as `encode` gave it, reconstructs: all, unless features are left out of it."""
        return code

    def observe(  # noqa: B027 (most do not look)
        self, dictionary: TrainableAutoencoder, code: Code, error_ND: Tensor, *, info: StepInfo, ranks: Ranks
    ) -> None:
        """Take notice of how a step's code reconstructs, before anything is updated.

        Args:
            code: as `encode` gave it.
            error_ND: x - x_hat of what was `kept` of it, detached.
        """

    def shares(self, info: StepInfo) -> Tensor | None:
        """Return the share of a batch's tokens that each feature may fire on [F] float64, None where any may."""
        return None

    def thresholds(self, dictionary: TrainableAutoencoder) -> Tensor | None:
        """Return the thresholds [F] that training itself has learned; None where it has none."""
        return None

    def encoder(self, dictionary: TrainableAutoencoder) -> tuple[Tensor, Tensor]:
        """Return the encoder of the exported autoencoder: W_enc [F, D], b_enc [F]."""
        return dictionary.W_enc, dictionary.b_enc

    def figures(self, info: StepInfo) -> dict[str, float]:
        """Return what a row of metrics says of this sparsifier alone, of the next step; it may wait for the device."""
        return {}

    def notes(self) -> dict[str, Any]:
        """Return what summary.json and sae.json say of this sparsifier alone, beside the figures: JSON values."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run must know, the same on every rank, for a checkpoint."""
        return {}

    def feature_state(self) -> dict[str, Tensor]:
        """Return what a resumed run must know of this rank's features, tensors [F, ...], for a checkpoint."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()` and `feature_state()` together."""
        assert not state, "a sparsifier with a state of its own loads it"


class Allocator(Sparsifier):
    """Chooses the matches of a batch, at most k x tokens of them; a batch is what all ranks hold together.

    Attributes:
        capacity: slots of every code of the run.
    """

    capacity: int

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        super().__init__(config, n_features=n_features)
        self.capacity = self.slots(max(self.k, self.start_k), config.batch_tokens)
        assert isinstance(config.sparsifier, AllocatorConfig)
        self._revival = config.sparsifier.revival
        self.kept_a_token = max(self.k, self.start_k)

    def equip(self, dictionary: TrainableAutoencoder, *, dead_window: int) -> None:
        self._silent_tokens = max(dead_window // SILENT_SHARE, round(SILENT_GAPS * self.n_features / self.k))

    def problems(self, config: RunConfig) -> list[str]:
        found, least = super().problems(config), min(self.k, self.start_k)
        if self.slots(least, config.batch_tokens) < 1:
            found.append(f"k={least:g}: leaves a batch of batch_tokens={config.batch_tokens} without a match. Raise k.")
        return found

    def slots(self, k: float, n_tokens: int) -> int:
        """Return how many matches `n_tokens` tokens may have at `k`."""
        return round(k * n_tokens)

    def encode(
        self,
        dictionary: TrainableAutoencoder,
        x_ND: Tensor,
        pre_NF: PreActivations,
        *,
        info: StepInfo,
        firing: Firing,
        ranks: Ranks,
    ) -> tuple[Code, Tensor | None]:
        chosen = self.select(pre_NF, info=info, firing=firing, ranks=ranks)
        return dictionary.attach(x_ND, chosen), None

    @torch.no_grad()
    def revive(self, dictionary: TrainableAutoencoder, *, firing: Firing, lost_rate: float, halted: Tensor) -> None:
        """Raise the bias of every silent feature by what Adam's largest step has lost, until it fires again.

        Ours. At the full rate the auxiliary loss brings features back. As the rate decays the cut rises above the
        affinities of many that fired often enough before, and no gradient is quick enough any more: most features that
        end dead die then.
        """
        silent_F = firing.dead_F(self._silent_tokens) & ~halted
        dictionary.b_enc.add_(silent_F.to(dictionary.b_enc.dtype), alpha=self._revival * lost_rate)

    @abstractmethod
    def select(self, pre_NF: PreActivations, *, info: StepInfo, firing: Firing, ranks: Ranks) -> SparseCode:
        """Return the code of this rank's tokens and features, its values detached; the choice is over all ranks'."""

    def code(self, matches: Matches, pre_NF: PreActivations) -> SparseCode:
        """Return matches as a code."""
        return SparseCode(**matches._asdict(), shape=(pre_NF.shape[0],), n_features=pre_NF.shape[1])
