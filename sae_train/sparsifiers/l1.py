"""ReLU autoencoders whose sparsity is bought: L1, and Lp with p annealed.

`relu`: the price is of the sum of values times the norms of their decoder rows. Norms are free (Anthropic's April 2024
update, seen without its equations, and libraries' code) or unit (Towards Monosemanticity, 2023).
`p_anneal`: the price is of the sum of values to the power p, and p falls from 1 (Karvonen et al. 2024, arXiv
2408.00113). The sum is scaled at each change of p so that the penalty stays equal. Ours: a bound on its gradient near
0, and the steering of the price, with a common shift of the biases where others have thresholds.
"""

import math

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import PAnnealConfig, ReLUConfig, SaeConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.state import State
from sae_train.sae.step_info import StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.penalised import Penalised, Valued

LEAST = 1e-3
"""Value below which p_anneal's gradient is constant, as a share of the activations' root mean square norm."""


class ReLU(Penalised):
    """A feature fires where its pre-activation is positive. The price is of the sum of contributions' norms."""

    matrices_held = 6
    first_price = 0.02

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        norms_are_free = isinstance(config.sparsifier, ReLUConfig) and config.sparsifier.norms == "free"
        self.has_unit_norms = not norms_are_free

    def thresholds(self, sae: TrainableAutoencoder) -> Tensor:
        return torch.zeros_like(sae.b_enc)

    def nudge(self, sae: TrainableAutoencoder, amount: Tensor) -> None:
        sae.b_enc.sub_(amount.to(sae.b_enc.dtype))

    def values(self, sae: TrainableAutoencoder, pre: Code, inputs: StepInputs) -> Valued:
        value = pre.value.relu()
        if self.has_unit_norms:
            return Valued(value, value.sum())
        norm = sae.W_dec.norm(dim=1)
        if isinstance(pre, SparseCode):
            norm = kernels.of_features(norm, pre.feature, pre.token, pre.start)
        return Valued(value, (value * norm).sum())


class PAnneal(ReLU):
    """A ReLU autoencoder of unit norms. The price is of the sum of values to the power p."""

    matrices_held = 12

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        assert isinstance(config.sparsifier, PAnnealConfig)
        self._settings = config.sparsifier
        self._factor = torch.ones((), dtype=torch.float64, device=ranks.device)

    def p_at(self, tokens: int, total_tokens: int) -> float:
        """Return p after so many tokens: from 1 to `end` in `changes` equal steps, the first at `start`."""
        first, changes = self._settings.start * total_tokens, self._settings.changes
        if tokens < first:
            return 1.0
        done = (tokens - first) / max(1.0, total_tokens - first)
        made = min(changes, 1 + math.floor(done * changes))
        return 1 + (self._settings.end - 1) * made / changes

    def values(self, sae: TrainableAutoencoder, pre: Code, inputs: StepInputs) -> Valued:
        value, info = super().values(sae, pre, inputs).value, inputs.info
        p = self.p_at(info.tokens, info.total_tokens)
        before = self.p_at(max(0, info.tokens - info.batch_tokens), info.total_tokens)
        if p != before:
            with torch.no_grad():
                powers = torch.stack([_power(value, before), _power(value, p)]).double()
                was, now = inputs.ranks.sum(powers)
                self._factor = torch.where(now > 0, self._factor * was / torch.where(now > 0, now, 1), self._factor)
        return Valued(value, self._factor.to(value.dtype) * _power(value, p))

    def state(self) -> State:
        return State(super().state().shared | {"factor": self._factor}, {})

    def load_state(self, state: State) -> None:
        self._factor = state.shared["factor"].to(self._factor.device)
        super().load_state(state)


def _power(value: Tensor, p: float) -> Tensor:
    """Return the sum of the positive values to the power p, continued by its tangent below `LEAST`, a scalar.

    The power's own gradient is unbounded near 0, where rounding would decide what is learned.
    """
    value = value.relu()
    least = torch.full_like(value, LEAST)
    powers = torch.maximum(value, least).pow(p)
    tangent = p * LEAST ** (p - 1) * (value - least)
    return (torch.where(value > LEAST, powers, LEAST**p + tangent) * (value > 0)).sum()
