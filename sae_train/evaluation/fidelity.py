"""How well reconstructions match activations: fvu, nmse and cosine."""

import math

import torch

from sae_train.evaluation.metric import EvaluationBatch, Metric, Subject, Sums, defined
from sae_train.evaluation.sharded_forward import Reconstruction
from sae_train.ranks.interface import Ranks


class Fidelity(Metric):
    """fvu, nmse and cosine of reconstructions x_hat of activations x, with e = x - x_hat.

    - fvu = sum |e|^2 / sum |x - mean|^2, over all tokens.
    - nmse = mean of |e|^2 / |x|^2, over the tokens where x is not 0.
    - cosine = mean of cos(x, x_hat), over the same tokens.
    """

    in_rows = ("fvu", "nmse", "cosine")

    def __init__(self, subject: Subject) -> None:
        self._shift_D = subject.centre_D.double()  # any point near the mean avoids cancellation
        self._shifted_sum_D = torch.zeros_like(self._shift_D)
        names = ("tokens", "error", "shifted_square", "nmse", "cosine", "nonzero_tokens")
        self._sums = Sums(*names, device=self._shift_D.device)

    @torch.no_grad()
    def update(self, batch: EvaluationBatch, made: Reconstruction) -> None:
        if len(batch.raw_ND) == 0:
            return
        x_ND, x_hat_ND = batch.raw_ND.double(), made.x_hat_ND.double()
        shifted_ND = x_ND - self._shift_D
        error_N = (x_ND - x_hat_ND).square().sum(1)
        square_N = x_ND.square().sum(1)
        is_nonzero_N = square_N > 0
        nmse_N = torch.where(is_nonzero_N, error_N / torch.where(is_nonzero_N, square_N, 1), 0)
        self._sums.add(
            tokens=len(x_ND),
            error=error_N.sum(),
            shifted_square=shifted_ND.square().sum(),
            nmse=nmse_N.sum(),
            cosine=torch.nn.functional.cosine_similarity(x_ND, x_hat_ND, dim=1, eps=1e-12).sum(),
            nonzero_tokens=is_nonzero_N.sum(),
        )
        self._shifted_sum_D += shifted_ND.sum(0)

    def figures(self, ranks: Ranks) -> dict[str, float]:
        sums = self._sums.over(ranks)
        n, n_nonzero = sums["tokens"], sums["nonzero_tokens"]
        if n == 0:
            return {}
        mean_D = ranks.sum(self._shifted_sum_D) / n
        variance = sums["shifted_square"] - n * float(mean_D.square().sum())
        return defined({
            "fvu": sums["error"] / variance if variance > 0 else math.nan,
            "nmse": sums["nmse"] / n_nonzero if n_nonzero else math.nan,
            "cosine": sums["cosine"] / n_nonzero if n_nonzero else math.nan,
        })  # fmt: skip
