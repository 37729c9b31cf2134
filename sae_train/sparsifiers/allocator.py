"""Allocators: sparsifiers that select the matches of a batch within a budget."""

from abc import abstractmethod

import torch
from torch import Tensor

from sae_train.config import AllocatorConfig, SaeConfig
from sae_train.kernels import Matches
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.base import Encoding, Sparsifier
from sae_train.sparsifiers.k_schedule import KSchedule

SILENT_SHARE = 4
"""A silent feature has not fired for at least this part of the dead window."""
SILENT_GAPS = 20
"""A silent feature has not fired for at least this many times the mean gap between firings of a feature. Where features
fire rarely, most of them do not fire for a quarter of the dead window now and then."""


class Allocator(Sparsifier):
    """Selects at most k x tokens matches of a batch. The batch is the tokens of all ranks.

    Attributes:
        capacity: slots of every code of the run: the largest budget of a batch.
    """

    capacity: int
    schedule: KSchedule

    reads_all = False

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        assert isinstance(config.sparsifier, AllocatorConfig)
        self.capacity = self.budget_of(self.schedule.most, sizes.batch_tokens)
        self._revival = config.sparsifier.revival
        gap = sizes.n_features / self.schedule.k
        self._silent_tokens = max(sizes.dead_window // SILENT_SHARE, round(SILENT_GAPS * gap))

    @classmethod
    def problems(cls, config: SaeConfig, sizes: SaeSizes) -> list[str]:
        found, least, n_tokens = super().problems(config, sizes), _schedule(config).least, sizes.batch_tokens
        if cls.budget_of(least, n_tokens) < 1:
            found.append(f"k={least:g}: leaves a batch of batch_tokens={n_tokens} without a match. Raise k.")
        return found

    @staticmethod
    def budget_of(k: float, n_tokens: int) -> int:
        """Return the number of matches that `n_tokens` tokens may have at `k`."""
        return round(k * n_tokens)

    def budget(self, info: StepInfo) -> int:
        """Return the number of matches that the batch of a step may have, over all ranks."""
        return self.budget_of(self.schedule.at(info), info.batch_tokens)

    def encode(self, sae: TrainableAutoencoder, inputs: StepInputs) -> Encoding:
        code = sae.attach(inputs.x_ND, self.select(inputs))
        return Encoding(code, code)

    @abstractmethod
    def select(self, inputs: StepInputs) -> SparseCode:
        """Return the code of this rank's tokens and features with detached values. The selection is over all ranks."""

    @staticmethod
    def code(matches: Matches, inputs: StepInputs) -> SparseCode:
        """Return matches of a step as a code."""
        n_tokens, n_features = inputs.pre_NF.shape
        return SparseCode(**matches._asdict(), shape=(n_tokens,), n_features=n_features)

    @torch.no_grad()
    def after_step(self, sae: TrainableAutoencoder, *, info: StepInfo, firing: Firing, halted: Tensor) -> None:
        """Raise the bias of every silent feature in proportion to the learning rate's decay, until it fires again.

        Ours. At the full rate the auxiliary loss brings features back. As the rate decays, the cut rises above the
        affinities of many features that fired often enough before, and no gradient is quick enough to follow. Most
        features that end dead die then.
        """
        silent_F = firing.dead_F(self._silent_tokens) & ~halted
        sae.b_enc.add_(silent_F.to(sae.b_enc.dtype), alpha=self._revival * info.lost_rate)


def _schedule(config: SaeConfig) -> KSchedule:
    schedule = KSchedule.of(config)
    assert schedule is not None, "an allocator has a k"
    return schedule
