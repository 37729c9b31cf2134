"""Gated: one affine map decides whether a feature fires, a rescaled copy of it how strongly.

Rajamanoharan et al. 2024 (arXiv 2404.16014), from libraries' code: f = 1[gate > 0] ReLU(exp(r) u + b_mag) with
u = W_enc x and gate = u + b_gate. The price is of the sum of ReLU(gate), which must also reconstruct alone, through a
frozen decoder. `b_enc` is the gate's bias. With its weights tied this way a gated feature is a JumpReLU feature, and is
exported as one. Ours: the steering of the price, with a common shift of the gates.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.sae.code import Code, SparseCode
from sae_train.sae.losses import reconstruction_loss
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import ExtraParameter, TrainableAutoencoder
from sae_train.sparsifiers.base import Export
from sae_train.sparsifiers.penalised import Penalised, Valued


class Gated(Penalised):
    """The price is of the sum of positive gates.

    Parameters: `log_magnitude` [F] is r, `b_magnitude` [F] is b_mag.
    """

    matrices_held = 10
    first_price = 0.02

    def extra_parameters(self) -> dict[str, ExtraParameter]:
        return {"log_magnitude": ExtraParameter(0.0), "b_magnitude": ExtraParameter(0.0)}

    def nudge(self, sae: TrainableAutoencoder, amount: Tensor) -> None:
        sae.b_enc.sub_(amount.to(sae.b_enc.dtype))

    def values(self, sae: TrainableAutoencoder, pre: Code, inputs: StepInputs) -> Valued:
        r, b_magnitude = _magnitude(sae)
        of_features: list[Tensor] = [r.exp(), b_magnitude, sae.b_enc]
        if isinstance(pre, SparseCode):
            places = pre.feature, pre.token, pre.start
            of_features = [kernels.of_features(each, *places) for each in of_features]
        scale, b_magnitude, b_gate = of_features
        magnitude = scale * (pre.value - b_gate) + b_magnitude
        value = torch.where(pre.value > 0, magnitude.relu(), 0)
        return Valued(value, pre.value.relu().sum(), extra_loss=self._gates_loss(sae, pre, inputs))

    def _gates_loss(self, sae: TrainableAutoencoder, pre: Code, inputs: StepInputs) -> Tensor:
        """Return this rank's share of the loss of a reconstruction from the positive gates."""
        gates = replace(pre, value=pre.value.relu())
        x_hat_ND = sae.decode(gates, ranks=inputs.ranks, frozen=True)
        return reconstruction_loss(inputs.x_ND, x_hat_ND, n_tokens=inputs.info.batch_tokens)

    @torch.no_grad()
    def export(self, sae: TrainableAutoencoder, info: StepInfo) -> Export:
        r, b_magnitude = _magnitude(sae)
        return replace(super().export(sae, info), W_enc=r.exp()[:, None] * sae.W_enc, b_enc=b_magnitude)

    @torch.no_grad()
    def thresholds(self, sae: TrainableAutoencoder) -> Tensor:
        """Return the magnitude [F] at which the gate opens: u > -b_gate means exp(r) u + b_mag > this."""
        r, b_magnitude = _magnitude(sae)
        return (b_magnitude - r.exp() * sae.b_enc).relu()


def _magnitude(sae: TrainableAutoencoder) -> tuple[Tensor, Tensor]:
    """Return r and b_mag [F]."""
    return sae.get_parameter("log_magnitude"), sae.get_parameter("b_magnitude")
