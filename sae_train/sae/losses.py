"""The reconstruction loss, and the auxiliary losses that keep features in use.

Every loss is a sum over this rank's tokens divided by a figure of the global batch: summed over ranks it is the loss.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import AuxKConfig, AuxZipfConfig, NoAuxLossConfig, RunConfig
from sae_train.ranks import Ranks
from sae_train.sae.allocation import default_shift, zipf_mass
from sae_train.sae.code import SparseCode
from sae_train.sae.dictionary import Dictionary
from sae_train.sae.firing import Firing


def reconstruction_loss(x_ND: Tensor, x_hat_ND: Tensor, *, n_tokens: int) -> Tensor:
    """Return the sum of squared errors of this rank's tokens over the global number of tokens, a scalar.

    On inputs of mean squared norm 1 about their centre this is the share of the variance that is missed.
    """
    return (x_ND - x_hat_ND).square().sum() / n_tokens


class AuxLoss:
    """Features that fire too rarely model the residual of the rest, so that they find a use.

    Dead features have underuse 1 and all others 0: the loss of Gao et al. 2024 (arXiv 2406.04093, A.2), scaled down
    while fewer features than slots are dead. Gradients reach both encoder and decoder.
    """

    def __init__(self, *, weight: float, d_model: int, dead_window: int) -> None:
        self.weight = weight
        self.slots = max(1, min(512, d_model // 2))
        self.dead_window = dead_window

    def underuse(self, firing: Firing) -> Tensor:
        """[F] in [0, 1], float64: how much a feature takes part."""
        return firing.dead_F(self.dead_window).double()

    def __call__(
        self,
        dictionary: Dictionary,
        x_ND: Tensor,
        pre_NF: Tensor,
        residual_ND: Tensor,
        *,
        firing: Firing,
        ranks: Ranks,
    ) -> Tensor:
        """Return this rank's weighted share of the loss, a scalar; 0 where no feature is underused.

        Args:
            dictionary: whose W_enc, b_enc and W_dec the loss trains.
            x_ND: normalised activations.
            pre_NF: their pre-activations.
            residual_ND: x - x_hat; no gradient flows into it.
            firing: counters of the steps before this one.
            ranks: the residual's variance is over all of them.
        """
        underuse_F = self.underuse(firing).to(x_ND.dtype)
        taking_part_F = underuse_F > 0
        if x_ND.device.type == "cpu" and not bool(taking_part_F.any()):
            return x_ND.new_zeros(())
        residual_ND = residual_ND.detach()
        matches = kernels.select_rows(
            pre_NF, k=self.slots, capacity=len(x_ND) * min(self.slots, dictionary.n_features), allowed_F=taking_part_F
        )
        code = SparseCode(**matches._asdict(), shape=(len(x_ND),), n_features=dictionary.n_features)
        code = dictionary.attach(x_ND, code)
        code = replace(code, value=code.value * underuse_F[code.feature.long()])
        error = (residual_ND - dictionary.decode(code, bias=False)).square().sum()
        variance = _total_variance(residual_ND, ranks)
        scale = (taking_part_F.sum() / self.slots).clamp(max=1)
        factor = torch.where(variance > 0, self.weight * scale / torch.where(variance > 0, variance, 1), 0)
        return factor.to(x_ND.dtype) * error


class AuxZipfLoss(AuxLoss):
    """Underuse by degrees, against the density that Zipf's law gives a feature's rank.

    Our reconstruction of arXiv 2411.02124's aux_zipf_loss, whose formula is not public. With tau = 0 and hard weights
    only dead features take part, and the loss is AuxLoss's bit for bit.
    """

    def __init__(
        self, *, weight: float, d_model: int, dead_window: int, tau: float, hard: bool, expected_F: Tensor
    ) -> None:
        super().__init__(weight=weight, d_model=d_model, dead_window=dead_window)
        self.tau, self.hard, self.expected_F = tau, hard, expected_F

    def underuse(self, firing: Firing) -> Tensor:
        dead_F = super().underuse(firing)
        if self.tau == 0:
            return dead_F
        density_F, order = firing.density_F.sort(descending=True, stable=True)
        if self.expected_F.device != density_F.device:
            self.expected_F = self.expected_F.to(density_F.device)  # once: moving it in every step would wait
        missing_F = torch.zeros_like(dead_F)
        missing_F[order] = (1 - density_F / (self.tau * self.expected_F)).clamp(0, 1)
        underuse_F = torch.maximum(dead_F, missing_F)
        return (underuse_F > 0).double() if self.hard else underuse_F


def build_aux_loss(config: RunConfig, *, d_model: int, n_features: int, dead_window: int) -> AuxLoss | None:
    """Return the auxiliary loss that `config.aux_loss` names; None for `aux_loss=none`."""
    match config.aux_loss:
        case NoAuxLossConfig():
            return None
        case AuxKConfig(weight=weight):
            return AuxLoss(weight=weight, d_model=d_model, dead_window=dead_window)
        case AuxZipfConfig() as aux:
            shift = default_shift(n_features) if aux.shift is None else aux.shift
            mass_F = zipf_mass(n_features, exponent=aux.exponent, shift=shift)
            return AuxZipfLoss(
                weight=aux.weight,
                d_model=d_model,
                dead_window=dead_window,
                tau=aux.tau,
                hard=aux.hard,
                expected_F=(config.k * mass_F).clamp(max=1),
            )
    raise TypeError(f"no auxiliary loss is built from {type(config.aux_loss).__name__}")


def _total_variance(rows_ND: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum over all ranks' rows of the squared distance from their mean, a scalar."""
    total = ranks.sum(torch.cat([rows_ND.sum(0), rows_ND.new_full((1,), len(rows_ND))]))
    return ranks.sum((rows_ND - total[:-1] / total[-1]).square().sum())
