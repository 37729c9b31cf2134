"""Penalised sparsifiers: nothing is selected; sparsity has a price, and the price is steered so that L0 comes to k."""

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import PenalisedConfig, RunConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, DenseCode, SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.base import Sparsifier
from sae_train.sparsifiers.price import Price

REVIVAL = 1e-3
"""Weight of the loss that revives dead features; with the update's 3e-6 twice as many stayed dead."""
DENSE_FROM = 16
"""A batch in which more than a 16th of all pairs matter is computed with its zeros: without them it would cost more."""


class Penalised(Sparsifier):
    """A sparsifier with a price; what it decides for a feature needs no other feature, so no other rank.

    Attributes:
        has_thresholds: whether features learn thresholds of their own.
        first_price: at the start; activations have a mean squared norm of 1.
    """

    first_price: float

    inference = "threshold"
    has_thresholds = False

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        assert isinstance(config.sparsifier, PenalisedConfig)
        super().__init__(config, n_features=n_features)
        self._settle, self._coefficient = config.sparsifier.settle, config.sparsifier.coefficient
        if config.k is not None:
            self.kept_a_token = self.k

    def equip(self, dictionary: TrainableAutoencoder, *, dead_window: int) -> None:
        self.dead_window = dead_window
        self.price = Price(
            self.first_price, settle=self._settle, device=dictionary.b_enc.device, fixed=self._coefficient
        )

    def bounds(self, dictionary: TrainableAutoencoder) -> Tensor:
        """Return what a pre-activation must exceed to matter to a value or a gradient, detached: [F] or a scalar."""
        return dictionary.b_enc.new_zeros(())

    @abstractmethod
    def values(
        self, dictionary: TrainableAutoencoder, code: Code, *, info: StepInfo, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        """Return the values of a code's slots, and what their price is of, summed over them; both differentiable.

        Args:
            code: with pre-activations and their graph in the place of values.
        """

    @abstractmethod
    def nudge(self, dictionary: TrainableAutoencoder, amount: Tensor) -> None:
        """Make all features fire less often by one common step, a scalar on the device (more often if negative).

        Where thresholds are learned it is of their logarithms, else of the biases, in units of the mean value.
        """

    @torch.no_grad()
    def prepare(self, dictionary: TrainableAutoencoder, *, halted: Tensor) -> None:
        amount = torch.where(halted, 0, self.price.nudge)
        self.nudge(dictionary, amount if self.has_thresholds else amount * self.price.size)

    def is_settling(self, info: StepInfo) -> bool:
        return info.tokens <= self._settle * info.total_tokens

    def revival(self, dictionary: TrainableAutoencoder, x_ND: Tensor, *, n_tokens: int, firing: Firing) -> Tensor:
        """Return what this rank's dead features lack to fire, summed over tokens and weighted, a scalar.

        A feature that fires nowhere has no gradient of the reconstruction, and a penalised one nothing to compete with.
        From Anthropic's January 2025 update, whose loss draws a dead JumpReLU feature's pre-activations and its
        threshold together; for gates and biases, and the weight, ours.
        """
        learned_F = self.thresholds(dictionary) if self.has_thresholds else None
        bound_F = torch.zeros_like(dictionary.b_enc) if learned_F is None else learned_F
        lacks_F = (bound_F - dictionary.b_enc) * (len(x_ND) / n_tokens) - dictionary.W_enc @ (x_ND.sum(0) / n_tokens)
        return REVIVAL * torch.where(firing.dead_F(self.dead_window), lacks_F, 0).sum()

    def exported_values(self, code: Code, value: Tensor) -> Tensor:
        """Return the values of a code's slots that count for L0: of what the exported autoencoder would fire."""
        return value

    def extra_loss(
        self, dictionary: TrainableAutoencoder, x_ND: Tensor, pre: Code, *, n_tokens: int, ranks: Ranks
    ) -> Tensor | None:
        """Return this rank's share of a loss that belongs to the method, if any; `pre` as in `values`."""
        return None

    def encode(
        self,
        dictionary: TrainableAutoencoder,
        x_ND: Tensor,
        pre_NF: kernels.PreActivations,
        *,
        info: StepInfo,
        firing: Firing,
        ranks: Ranks,
    ) -> tuple[Code, Tensor | None]:
        price = self.price.now(info)
        pre = self._attach(dictionary, x_ND, pre_NF)
        value, priced = self.values(dictionary, pre, info=info, ranks=ranks)
        with torch.no_grad():
            fired = self.exported_values(pre, value)
            counts = torch.stack([(fired > 0).sum(), fired.sum(dtype=torch.float64)])
            fires, total = ranks.sum(counts)
            self.price.look(fires / info.batch_tokens, size=total / fires, k=self.k_at(info), info=info)
        penalty = (price / info.batch_tokens).to(priced.dtype) * priced
        penalty = penalty + self.revival(dictionary, x_ND, n_tokens=info.batch_tokens, firing=firing)
        extra = self.extra_loss(dictionary, x_ND, pre, n_tokens=info.batch_tokens, ranks=ranks)
        return replace(pre, value=value), penalty if extra is None else penalty + extra

    def _attach(self, dictionary: TrainableAutoencoder, x_ND: Tensor, pre_NF: kernels.PreActivations) -> Code:
        """Return the pre-activations that matter, with their graph; the same function with its zeros or without."""
        n_tokens, n_features = pre_NF.shape
        most = n_tokens * n_features / DENSE_FROM
        matches = kernels.select_few_above(pre_NF, self.bounds(dictionary), most=most)
        if matches is None:
            whole_NF = pre_NF.whole() if isinstance(pre_NF, kernels.Screened) else pre_NF
            return DenseCode(value=dictionary.attach_dense(x_ND, whole_NF))
        places = SparseCode(**matches._asdict(), shape=(n_tokens,), n_features=n_features)
        return dictionary.attach(x_ND, places)

    def figures(self, info: StepInfo) -> dict[str, float]:
        return {"train/coefficient": float(self.price.now(info))}

    def state(self) -> dict[str, Tensor]:
        return self.price.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.price.load_state(state)
