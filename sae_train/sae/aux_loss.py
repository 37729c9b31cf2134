"""The auxiliary losses that keep features in use.

A loss is a sum over the tokens of this rank. Summed over the ranks that hold other tokens (`ranks.data`) it is the loss
of the batch.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import AuxKConfig, AuxZipfConfig, NoAuxLossConfig, SaeConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.losses import errors_of, squared_error
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.state import State
from sae_train.sae.step_info import StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sae.zipf_budget import default_shift, zipf_mass

RERANKED_A_WINDOW = 8
"""Times that aux_zipf ranks the features in a dead window."""


class AuxLoss:
    """Underused features model the residual of the others, so that they find a use.

    Dead features have underuse 1 and all others 0: the loss of Gao et al. 2024 (arXiv 2406.04093, A.2), scaled down
    while fewer than k_aux features are dead. Gradients reach both encoder and decoder. `build_aux_loss` creates it, and
    the learner calls it once a step.

    Attributes:
        k_aux: matches that a token has at most in this loss.
    """

    def __init__(self, sizes: SaeSizes, *, weight: float) -> None:
        self.weight, self.n_features, self.dead_window = weight, sizes.n_features, sizes.dead_window
        self.k_aux = max(1, min(512, sizes.d_model // 2))

    def underuse(self, inputs: StepInputs) -> Tensor:
        """Return the degree [F], 0 to 1, float64, to which each feature of this rank takes part."""
        return inputs.firing.dead_F(self.dead_window).double()

    def __call__(self, sae: TrainableAutoencoder, inputs: StepInputs, residual_ND: Tensor) -> Tensor:
        """Return this rank's share of the weighted loss, a scalar. It is 0 where no feature is underused.

        Args:
            sae: the features of this rank. The loss trains W_enc, b_enc and W_dec.
            inputs: the step's tensors.
            residual_ND: x - x_hat of the step's reconstruction. No gradient flows into it.
        """
        x_ND, ranks = inputs.x_ND, inputs.ranks
        underuse_F = self.underuse(inputs).to(x_ND.dtype)
        taking_part_F = underuse_F > 0
        n_taking_part = ranks.features.sum(taking_part_F.sum())
        if x_ND.device.type == "cpu" and not int(n_taking_part):
            return x_ND.new_zeros(())
        residual_ND = residual_ND.detach()
        matches = kernels.select_rows(
            inputs.pre_NF,
            k=self.k_aux,
            capacity=len(x_ND) * min(self.k_aux, sae.n_features),
            n_features=self.n_features,
            allowed_F=taking_part_F,
            ranks=ranks,
        )
        code = SparseCode(**matches._asdict(), shape=(len(x_ND),), n_features=sae.n_features)
        code = sae.attach(x_ND, code)
        code = replace(code, value=code.value * underuse_F[code.feature.long()])
        x_hat_ND = sae.decode(code, ranks=ranks, bias=False)
        error = squared_error(x_hat_ND, errors_of(residual_ND, x_hat_ND))
        variance = _total_variance(residual_ND, ranks.data)
        scale = (n_taking_part / self.k_aux).clamp(max=1)
        factor = torch.where(variance > 0, self.weight * scale / torch.where(variance > 0, variance, 1), 0)
        return factor.to(x_ND.dtype) * error

    def state(self) -> State:
        """Return the tensors to save."""
        return State({}, {})

    def load_state(self, state: State) -> None:
        """Continue from a `state()` of these features."""


class AuxZipfLoss(AuxLoss):
    """Underuse by degrees, against the density that Zipf's law gives a feature's rank.

    Our reconstruction of arXiv 2411.02124's aux_zipf_loss, whose formula is not public. With tau = 0 and hard weights
    only dead features take part, and the loss is AuxLoss's bit for bit.

    Args:
        law_F: density that the law gives each rank, the densest first.
        tau: share of that density below which a feature is underused.
        hard: underused features take part fully, not by degrees.
    """

    def __init__(self, sizes: SaeSizes, *, weight: float, tau: float, hard: bool, law_F: Tensor) -> None:
        super().__init__(sizes, weight=weight)
        self.tau, self.hard, self._law_F = tau, hard, law_F
        self._rerank_every = max(1, sizes.dead_window // RERANKED_A_WINDOW)
        self._expected_F: Tensor | None = None

    def underuse(self, inputs: StepInputs) -> Tensor:
        dead_F = super().underuse(inputs)
        if self.tau == 0:
            return dead_F
        expected_F = self._expected(inputs)
        missing_F = (1 - inputs.firing.density_F / (self.tau * expected_F)).clamp(0, 1)
        underuse_F = torch.maximum(dead_F, missing_F)
        return (underuse_F > 0).double() if self.hard else underuse_F

    def _expected(self, inputs: StepInputs) -> Tensor:
        """Return the density [F], float64, that the law gives the rank of each of this rank's features.

        Features are ranked by density over all ranks, the lower feature first where two are equal. Their order depends
        on every rank's features. It moves slowly, so it is renewed only a few times in a dead window.
        """
        info, ranks = inputs.info, inputs.ranks
        before = info.tokens - info.batch_tokens
        if self._expected_F is None or before // self._rerank_every != info.tokens // self._rerank_every:
            density_F = ranks.features.gather_slices(inputs.firing.density_F, self.n_features)
            law_F = self._law_F.to(density_F.device, non_blocking=True)
            expected_F = torch.empty_like(law_F)
            expected_F[density_F.sort(descending=True, stable=True).indices] = law_F
            lo, hi = ranks.features.slice(self.n_features)
            self._expected_F = expected_F[lo:hi].clone()
        return self._expected_F

    def state(self) -> State:
        return State({}, {} if self._expected_F is None else {"expected": self._expected_F})

    def load_state(self, state: State) -> None:
        if "expected" in state.features:
            self._expected_F = state.features["expected"].to(self._law_F.dtype)


def build_aux_loss(config: SaeConfig, sizes: SaeSizes) -> AuxLoss | None:
    """Return the auxiliary loss that `config.aux_loss` names; None for `aux_loss=none`."""
    match config.aux_loss:
        case NoAuxLossConfig():
            return None
        case AuxKConfig(weight=weight):
            return AuxLoss(sizes, weight=weight)
        case AuxZipfConfig() as aux:
            shift = default_shift(sizes.n_features) if aux.shift is None else aux.shift
            mass_F = zipf_mass(sizes.n_features, exponent=aux.exponent, shift=shift)
            assert config.k is not None, "aux_zipf is refused where a coefficient takes the place of k"
            law_F = (config.k * mass_F).clamp(max=1)
            return AuxZipfLoss(sizes, weight=aux.weight, tau=aux.tau, hard=aux.hard, law_F=law_F)
    raise TypeError(f"no auxiliary loss is built from {type(config.aux_loss).__name__}")


def _total_variance(rows_ND: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum over all ranks' rows of the squared distance from their mean, a scalar."""
    total = ranks.sum(torch.cat([rows_ND.sum(0), rows_ND.new_full((1,), len(rows_ND))]))
    return ranks.sum((rows_ND - total[:-1] / total[-1]).square().sum())
