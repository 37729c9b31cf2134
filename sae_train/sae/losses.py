"""The reconstruction loss, and the auxiliary losses that keep features in use.

Every loss is a sum over the tokens that this rank holds, divided by a figure of the global batch: summed over the
ranks that hold other tokens (`ranks.data`) it is the loss.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import AuxKConfig, AuxZipfConfig, NoAuxLossConfig, RunConfig
from sae_train.kernels.function import applied
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.step_info import StepInfo
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sae.zipf_budget import default_shift, zipf_mass

RERANKED_A_WINDOW = 8
"""How often in a dead window aux_zipf ranks the features anew."""


def reconstruction_loss(x_ND: Tensor, x_hat_ND: Tensor, *, n_tokens: int) -> Tensor:
    """Return the sum of squared errors of this rank's tokens over the global number of tokens, a scalar.

    On inputs of mean squared norm 1 about their centre this is the share of the variance that is missed. Gradients
    reach x_hat alone.

    Args:
        x_ND: activations.
        x_hat_ND: their reconstruction, or several [G, N, D], each of which is a summand.
        n_tokens: of the global batch.
    """
    return squared_error(x_hat_ND, kernels.missed(x_ND, x_hat_ND)) / n_tokens


def squared_error(x_hat: Tensor, missed: kernels.Missed, bias_D: Tensor | None = None) -> Tensor:
    """Return the sum of squares of what x_hat + bias has missed; differentiable in x_hat and the bias."""
    return applied(_SquaredError, x_hat, *missed, bias_D)


class _SquaredError(torch.autograd.Function):
    """One tensor of the inputs' size, backward, where torch's own operations make five."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, error: Tensor, norm: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(error)
        return norm.square().sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = ctx.saved_tensors
        if not ctx.needs_input_grad[3]:
            return error * (-2 * grads[0]), None, None, None
        grad, grad_bias = kernels.scaled_and_sum(error, -2 * grads[0])
        return grad, None, None, grad_bias


class AuxLoss:
    """Features that fire too rarely model the residual of the rest, so that they find a use.

    Dead features have underuse 1 and all others 0: the loss of Gao et al. 2024 (arXiv 2406.04093, A.2), scaled down
    while fewer features than slots are dead. Gradients reach both encoder and decoder.
    """

    def __init__(self, *, weight: float, d_model: int, n_features: int, dead_window: int) -> None:
        self.weight = weight
        self.n_features = n_features
        self.slots = max(1, min(512, d_model // 2))
        self.dead_window = dead_window

    def underuse(self, firing: Firing, *, info: StepInfo, ranks: Ranks) -> Tensor:
        """[F] in [0, 1], float64: how much each of this rank's features takes part."""
        return firing.dead_F(self.dead_window).double()

    def __call__(
        self,
        dictionary: TrainableAutoencoder,
        x_ND: Tensor,
        pre_NF: kernels.PreActivations,
        residual_ND: Tensor,
        *,
        firing: Firing,
        info: StepInfo,
        ranks: Ranks,
    ) -> Tensor:
        """Return this rank's tokens' weighted share of the loss, a scalar; 0 where no feature is underused.

        Args:
            dictionary: whose W_enc, b_enc and W_dec the loss trains.
            x_ND: normalised activations.
            pre_NF: their pre-activations.
            residual_ND: x - x_hat; no gradient flows into it.
            firing: counters of the steps before this one.
            info: where in the run.
            ranks: the residual's variance is over all of them.
        """
        underuse_F = self.underuse(firing, info=info, ranks=ranks).to(x_ND.dtype)
        taking_part_F = underuse_F > 0
        n_taking_part = ranks.features.sum(taking_part_F.sum())
        if x_ND.device.type == "cpu" and not int(n_taking_part):
            return x_ND.new_zeros(())
        residual_ND = residual_ND.detach()
        matches = kernels.select_rows(
            pre_NF,
            k=self.slots,
            capacity=len(x_ND) * min(self.slots, dictionary.n_features),
            n_features=self.n_features,
            allowed_F=taking_part_F,
            ranks=ranks,
        )
        code = SparseCode(**matches._asdict(), shape=(len(x_ND),), n_features=dictionary.n_features)
        code = dictionary.attach(x_ND, code)
        code = replace(code, value=code.value * underuse_F[code.feature.long()])
        x_hat_ND = dictionary.decode(code, ranks=ranks, bias=False)
        error = squared_error(x_hat_ND, kernels.missed(residual_ND, x_hat_ND))
        variance = _total_variance(residual_ND, ranks.data)
        scale = (n_taking_part / self.slots).clamp(max=1)
        factor = torch.where(variance > 0, self.weight * scale / torch.where(variance > 0, variance, 1), 0)
        return factor.to(x_ND.dtype) * error

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run must know, one entry a feature, of this rank's features."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`."""


class AuxZipfLoss(AuxLoss):
    """Underuse by degrees, against the density that Zipf's law gives a feature's rank.

    Our reconstruction of arXiv 2411.02124's aux_zipf_loss, whose formula is not public. With tau = 0 and hard weights
    only dead features take part, and the loss is AuxLoss's bit for bit.
    """

    def __init__(
        self,
        *,
        weight: float,
        d_model: int,
        dead_window: int,
        tau: float,
        hard: bool,
        law_F: Tensor,
    ) -> None:
        super().__init__(weight=weight, d_model=d_model, n_features=len(law_F), dead_window=dead_window)
        self.tau, self.hard, self._law_F = tau, hard, law_F
        self._rerank_every = max(1, dead_window // RERANKED_A_WINDOW)
        self._expected_F: Tensor | None = None

    def underuse(self, firing: Firing, *, info: StepInfo, ranks: Ranks) -> Tensor:
        dead_F = super().underuse(firing, info=info, ranks=ranks)
        if self.tau == 0:
            return dead_F
        expected_F = self._expected(firing, info=info, ranks=ranks)
        missing_F = (1 - firing.density_F / (self.tau * expected_F)).clamp(0, 1)
        underuse_F = torch.maximum(dead_F, missing_F)
        return (underuse_F > 0).double() if self.hard else underuse_F

    def _expected(self, firing: Firing, *, info: StepInfo, ranks: Ranks) -> Tensor:
        """[F] float64: the density that the law gives the rank of each of this rank's features.

        Features are ranked by density over all ranks, the lower feature first where two are equal. Ranks move slowly,
        and their order is the one thing here that every rank's features decide, so it is renewed now and then.
        """
        before = info.tokens - info.batch_tokens
        if self._expected_F is None or before // self._rerank_every != info.tokens // self._rerank_every:
            density_F = ranks.features.gather_slices(firing.density_F, self.n_features)
            law_F = self._law_F.to(density_F.device, non_blocking=True)
            expected_F = torch.empty_like(law_F)
            expected_F[density_F.sort(descending=True, stable=True).indices] = law_F
            lo, hi = ranks.features.slice(self.n_features)
            self._expected_F = expected_F[lo:hi].clone()
        return self._expected_F

    def state(self) -> dict[str, Tensor]:
        return {} if self._expected_F is None else {"expected": self._expected_F}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if "expected" in state:
            self._expected_F = state["expected"].to(self._law_F.dtype)


def build_aux_loss(config: RunConfig, *, d_model: int, n_features: int, dead_window: int) -> AuxLoss | None:
    """Return the auxiliary loss that `config.aux_loss` names; None for `aux_loss=none`."""
    match config.aux_loss:
        case NoAuxLossConfig():
            return None
        case AuxKConfig(weight=weight):
            return AuxLoss(weight=weight, d_model=d_model, n_features=n_features, dead_window=dead_window)
        case AuxZipfConfig() as aux:
            shift = default_shift(n_features) if aux.shift is None else aux.shift
            mass_F = zipf_mass(n_features, exponent=aux.exponent, shift=shift)
            return AuxZipfLoss(
                weight=aux.weight,
                d_model=d_model,
                dead_window=dead_window,
                tau=aux.tau,
                hard=aux.hard,
                law_F=(config.usual_k * mass_F).clamp(max=1),
            )
    raise TypeError(f"no auxiliary loss is built from {type(config.aux_loss).__name__}")


def _total_variance(rows_ND: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum over all ranks' rows of the squared distance from their mean, a scalar."""
    total = ranks.sum(torch.cat([rows_ND.sum(0), rows_ND.new_full((1,), len(rows_ND))]))
    return ranks.sum((rows_ND - total[:-1] / total[-1]).square().sum())
