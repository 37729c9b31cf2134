"""Gated: one affine map decides whether a feature fires, a rescaled copy of it how strongly.

Rajamanoharan et al. 2024 (arXiv 2404.16014), from libraries' code: f = 1[gate > 0] ReLU(exp(r) u + b_mag) with
u = W_enc x and gate = u + b_gate; the price is of the sum of ReLU(gate), which alone is to reconstruct, too, through a
frozen decoder. `b_enc` is the gate's bias. With its weights tied this way a gated feature is a JumpReLU feature, and is
exported as one. Ours: the steering of the price, with a common shift of the gates.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from sae_train import kernels
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.losses import reconstruction_loss
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sparsifiers.penalised import Penalised


class Gated(Penalised):
    """The price is of the sum of positive gates."""

    first_price = 0.02

    def equip(self, dictionary: TrainableAutoencoder, *, dead_window: int) -> None:
        super().equip(dictionary, dead_window=dead_window)
        dictionary.log_magnitude = nn.Parameter(torch.zeros_like(dictionary.b_enc))
        dictionary.b_magnitude = nn.Parameter(torch.zeros_like(dictionary.b_enc))

    def nudge(self, dictionary: TrainableAutoencoder, amount: Tensor) -> None:
        dictionary.b_enc.sub_(amount.to(dictionary.b_enc.dtype))

    def values(
        self, dictionary: TrainableAutoencoder, code: Code, *, info: StepInfo, ranks: Ranks
    ) -> tuple[Tensor, Tensor]:
        of_features: list[Tensor] = [dictionary.log_magnitude.exp(), dictionary.b_magnitude, dictionary.b_enc]
        if isinstance(code, SparseCode):
            places = code.feature, code.token, code.start
            of_features = [kernels.of_features(each, *places) for each in of_features]
        scale, b_magnitude, b_gate = of_features
        magnitude = scale * (code.value - b_gate) + b_magnitude
        return torch.where(code.value > 0, magnitude.relu(), 0), code.value.relu().sum()

    def extra_loss(
        self, dictionary: TrainableAutoencoder, x_ND: Tensor, pre: Code, *, n_tokens: int, ranks: Ranks
    ) -> Tensor:
        gates = replace(pre, value=pre.value.relu())
        x_hat_ND = dictionary.decode(gates, ranks=ranks, frozen=True)
        return reconstruction_loss(x_ND, x_hat_ND, n_tokens=n_tokens)

    @torch.no_grad()
    def encoder(self, dictionary: TrainableAutoencoder) -> tuple[Tensor, Tensor]:
        return dictionary.log_magnitude.exp()[:, None] * dictionary.W_enc, dictionary.b_magnitude

    @torch.no_grad()
    def thresholds(self, dictionary: TrainableAutoencoder) -> Tensor:
        """Return where the gate opens, on the scale of magnitudes [F]: u > -b_gate is exp(r) u + b_mag > this."""
        return (dictionary.b_magnitude - dictionary.log_magnitude.exp() * dictionary.b_enc).relu()
