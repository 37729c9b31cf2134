"""How well an SAE reconstructs activations, in sums that add up over batches and ranks.

Letters: N this rank's tokens, D d_model, F this rank's features. All sums are float64, so their order hardly matters.
"""

import math

import torch
from torch import Tensor

from sae_train.evaluation.spread import Reconstruction
from sae_train.ranks.interface import Ranks

L0_BINS = 4096  # per-token L0 above this counts as this; percentiles of useful SAEs are far below


class ReconstructionTotals:
    """Sums behind fvu, nmse, cosine, l0 and densities; definitions in `figures`.

    Args:
        shift_D: [D] somewhere near the mean activation, the same on every rank: avoids cancellation where it is large.
        n_features: of the whole dictionary.
        ranks: the grid; a row's ranks hold the other features.
    """

    def __init__(self, *, shift_D: Tensor, n_features: int, ranks: Ranks) -> None:
        zeros, device = torch.zeros, shift_D.device
        first, last = ranks.features.slice(n_features)
        self.shift_D, self.n_features, self._ranks = shift_D.detach().double(), n_features, ranks
        # tokens; sums of |e|^2, |x - shift|^2, |e|^2 / |x|^2, cosine, l0; tokens with |x| > 0
        self.scalars = zeros(7, dtype=torch.float64, device=device)
        self.shifted_sum_D = torch.zeros_like(self.shift_D)
        self.fired_F = zeros(last - first, dtype=torch.int64, device=device)  # of the row's tokens
        self.l0_histogram = zeros(L0_BINS + 1, dtype=torch.int64, device=device)
        self.context_sums = zeros(4, dtype=torch.float64, device=device)  # contexts; sums of tokens^2, tokens*l0, l0^2

    @torch.no_grad()
    def add(self, raw_ND: Tensor, context_N: Tensor, made: Reconstruction) -> None:
        """Add raw activations [N, D] and what became of them.

        Args:
            context_N: which context each token comes from; no context spans two calls.
            made: their reconstructions; counts the firings of the row's other tokens too.
        """
        self.fired_F += made.fired_F
        if len(raw_ND) == 0:
            return
        x_ND, x_hat_ND, l0_N = raw_ND.double(), made.x_hat_ND.double(), made.l0_N
        shifted_ND = x_ND - self.shift_D
        error_N = (x_ND - x_hat_ND).square().sum(1)
        norm_N = x_ND.square().sum(1)
        cosine_N = torch.nn.functional.cosine_similarity(x_ND, x_hat_ND, dim=1, eps=1e-12)
        some_N = norm_N > 0
        self.scalars += torch.stack([
            torch.tensor(float(len(x_ND)), dtype=torch.float64, device=x_ND.device),
            error_N.sum(),
            shifted_ND.square().sum(),
            torch.where(some_N, error_N / torch.where(some_N, norm_N, 1), 0).sum(),
            cosine_N.sum(),
            l0_N.sum().double(),
            some_N.sum().double(),
        ])  # fmt: skip
        self.shifted_sum_D += shifted_ND.sum(0)
        self.l0_histogram += torch.bincount(l0_N.clamp_max(L0_BINS), minlength=L0_BINS + 1)
        _, group_N, tokens_C = context_N.unique(return_inverse=True, return_counts=True)
        l0_C = torch.zeros_like(tokens_C).index_add_(0, group_N, l0_N).double()
        t_C = tokens_C.double()
        self.context_sums += torch.stack([t_C.new_tensor(float(len(t_C))), t_C @ t_C, t_C @ l0_C, l0_C @ l0_C])

    def figures(self) -> dict[str, float]:
        """Return the figures over all ranks' tokens and features. Collective.

        fvu = sum |e|^2 / sum |x - mean|^2; nmse = mean |e|^2 / |x|^2 and cosine = mean cos(x, x_hat), where x is not 0;
        l0 = mean number of features that fire on a token, its standard error over contexts (ratio estimator);
        dead_fraction = share of features that fire on none of these tokens. A figure that is not defined (one context
        has no standard error) is left out.
        """
        ranks = self._ranks
        n, error, spread, nmse, cosine, l0, n_some = ranks.sum(self.scalars).tolist()
        if n == 0:
            return {}
        mean_D = ranks.sum(self.shifted_sum_D) / n
        variance = spread - n * float(mean_D.square().sum())
        silent = ranks.features.sum((ranks.data.sum(self.fired_F) == 0).sum())
        percentiles = histogram_percentiles(ranks.sum(self.l0_histogram), (0.05, 0.5, 0.95))
        figures = {
            "fvu": error / variance if variance > 0 else math.nan,
            "nmse": nmse / n_some if n_some else math.nan,
            "cosine": cosine / n_some if n_some else math.nan,
            "l0": l0 / n,
            "l0_standard_error": self._l0_standard_error(mean=l0 / n, n_tokens=n),
            "l0_p5": percentiles[0],
            "l0_p50": percentiles[1],
            "l0_p95": percentiles[2],
            "dead_fraction": int(silent) / self.n_features,
            "evaluation_tokens": int(n),
        }
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def density(self) -> Tensor:
        """Return [n_features] float64: the share of tokens on which each feature fires. Collective."""
        n = self._ranks.sum(self.scalars)[0].clamp_min(1)
        fired_F = self._ranks.data.sum(self.fired_F)
        return self._ranks.features.gather_slices(fired_F, self.n_features).double() / n

    def _l0_standard_error(self, *, mean: float, n_tokens: float) -> float:
        """Standard error of l0 with contexts as the unit (ratio estimator): tokens of one context are alike."""
        n, tt, tl, ll = self._ranks.sum(self.context_sums).tolist()
        if n < 2:
            return math.nan
        squares = max(ll - 2 * mean * tl + mean * mean * tt, 0.0)
        return math.sqrt(squares / (n - 1) * n) / n_tokens


def histogram_percentiles(counts: Tensor, shares: tuple[float, ...]) -> list[int]:
    """Return for each share the smallest bin whose running total reaches that share of all counts."""
    running = counts.cumsum(0)
    targets = torch.tensor([share * float(running[-1]) for share in shares], device=counts.device)
    return [int(i) for i in torch.searchsorted(running.double(), targets.double())]
