"""ReLU autoencoders whose sparsity is bought: L1, and Lp with p annealed.

`relu`: the price is of the sum of values times the norms of their decoder rows, norms free (Anthropic's April 2024
update, seen without its equations, and libraries' code), or with unit norms (Towards Monosemanticity, 2023).
`p_anneal`: the sum of values to the power p, p falling from 1 (Karvonen et al. 2024, arXiv 2408.00113), scaled at each
change of p so that the penalty stays what it was. Ours: a bound on its gradient near 0, and the steering of the price,
with a common shift of the biases where others have thresholds.
"""

import math

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import PAnnealConfig, ReLUConfig, RunConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.penalised import Penalised

LEAST = 1e-3
"""Value, as a share of the activations' root mean square norm, below which p_anneal's gradient stays what it is."""


class ReLU(Penalised):
    """A feature fires where its pre-activation is positive; the price is of the sum of contributions' norms."""

    first_price = 0.02

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        self._free = isinstance(config.sparsifier, ReLUConfig) and config.sparsifier.norms == "free"
        super().__init__(config, n_features=n_features)

    def equip(self, dictionary: TrainableAutoencoder, *, dead_window: int) -> None:
        super().equip(dictionary, dead_window=dead_window)
        dictionary.has_unit_norms = not self._free

    def thresholds(self, dictionary: TrainableAutoencoder) -> Tensor:
        return torch.zeros_like(dictionary.b_enc)

    def nudge(self, dictionary: TrainableAutoencoder, amount: Tensor) -> None:
        dictionary.b_enc.sub_(amount.to(dictionary.b_enc.dtype))

    def values(
        self, dictionary: TrainableAutoencoder, code: Code, *, info: StepInfo, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        value = code.value.relu()
        if not self._free:
            return value, value.sum()
        norm = dictionary.W_dec.norm(dim=1)
        if isinstance(code, SparseCode):
            norm = kernels.of_features(norm, code.feature, code.token, code.start)
        return value, (value * norm).sum()


class PAnneal(ReLU):
    """A ReLU autoencoder of unit norms; the price is of the sum of values to the power p."""

    def __init__(self, config: RunConfig, *, n_features: int) -> None:
        assert isinstance(config.sparsifier, PAnnealConfig)
        self._settings = config.sparsifier
        super().__init__(config, n_features=n_features)

    def equip(self, dictionary: TrainableAutoencoder, *, dead_window: int) -> None:
        super().equip(dictionary, dead_window=dead_window)
        self._factor = torch.ones((), dtype=torch.float64, device=dictionary.b_enc.device)

    def p_at(self, tokens: int, total_tokens: int) -> float:
        """Return p after so many tokens: from 1 to `end` in `changes` equal steps, the first at `start`."""
        first, changes = self._settings.start * total_tokens, self._settings.changes
        if tokens < first:
            return 1.0
        done = (tokens - first) / max(1.0, total_tokens - first)
        made = min(changes, 1 + math.floor(done * changes))
        return 1 + (self._settings.end - 1) * made / changes

    def values(
        self, dictionary: TrainableAutoencoder, code: Code, *, info: StepInfo, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        value, _ = super().values(dictionary, code, info=info, ranks=ranks)
        p = self.p_at(info.tokens, info.total_tokens)
        before = self.p_at(max(0, info.tokens - info.batch_tokens), info.total_tokens)
        if p != before:
            with torch.no_grad():
                was, now = ranks.sum(torch.stack([_power(value, before), _power(value, p)]).double())
                self._factor = torch.where(now > 0, self._factor * was / torch.where(now > 0, now, 1), self._factor)
        return value, self._factor.to(value.dtype) * _power(value, p)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"factor": self._factor}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._factor = state["factor"].to(self._factor.device)
        super().load_state(state)


def _power(value: Tensor, p: float) -> Tensor:
    """Return the sum of the positive values to the power p, continued by its tangent below `LEAST`.

    The power's own gradient has no bound near 0: there rounding would decide what is learned.
    """
    value = value.relu()
    least = torch.full_like(value, LEAST)
    powers = torch.maximum(value, least).pow(p)
    tangent = p * LEAST ** (p - 1) * (value - least)
    return (torch.where(value > LEAST, powers, LEAST**p + tangent) * (value > 0)).sum()
