"""Sums over a log interval, kept on the device and reduced over ranks once a row.

Observing never changes a run: the training step reads nothing from here. docs/metrics.md explains each figure.
"""

from typing import Any

import torch
from torch import Tensor

from sae_train.evaluation.density import density_figures, density_histogram
from sae_train.evaluation.l0 import L0_BINS, histogram_percentiles
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code
from sae_train.sae.firing import Firing
from sae_train.sae.state import State

LARGEST_SPREAD = 1.0
"""Epochs that the fastest lane may be ahead of the slowest without a warning."""


class Totals:
    """This rank's sums over the steps since the last row of metrics. A `Learner` makes one.

    Args:
        d_model: width of the activations.
        ranks: that a row is reduced over.
    """

    NAMES = ("tokens", "error", "square", "loss", "aux", "matches", "budget", "steps", "grad_norm")

    def __init__(self, *, d_model: int, ranks: Ranks) -> None:
        device = ranks.device
        self._ranks = ranks
        self._share = 1 / ranks.size  # of a step, so that sums of another number of ranks stay right
        self.scalars = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.sum_D = torch.zeros(d_model, dtype=torch.float64, device=device)
        self.l0_histogram = torch.zeros(L0_BINS + 1, dtype=torch.int64, device=device)
        self.least_kept = torch.full((), float("inf"), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        *,
        sum_D: Tensor,
        norm_N: Tensor,
        missed_N: Tensor,
        l0_N: Tensor,
        code: Code,
        loss: Tensor,
        aux: Tensor | None,
        grad_norm: Tensor,
        budget: float,
    ) -> None:
        """Add one step.

        Args:
            sum_D: sum of the activations that this rank harvested, float64.
            norm_N: norms of these activations.
            missed_N: norms of their reconstruction errors.
            l0_N: active features of each of these tokens.
            code: of the tokens and features that this rank holds.
            loss: this rank's summand of the loss.
            aux: this rank's summand of the auxiliary loss, None without one.
            grad_norm: norm of the whole gradient.
            budget: expected number of matches of the tokens that this rank harvested.
        """
        value = code.value.detach().flatten()
        device_values = [
            _sum_of_squares(missed_N),
            _sum_of_squares(norm_N),
            loss.detach().double(),
            torch.zeros_like(loss, dtype=torch.float64) if aux is None else aux.detach().double(),
            l0_N.sum().double(),
        ]
        self.scalars[0] += len(norm_N)
        self.scalars[1:6] += torch.stack(device_values)
        self.scalars[6] += budget
        self.scalars[7] += self._share
        self.scalars[8] += grad_norm.double() * self._share
        self.sum_D += sum_D
        self.l0_histogram.index_add_(0, l0_N.clamp_max(L0_BINS), torch.ones_like(l0_N))  # bincount waits
        if len(value) > 0:
            smallest = torch.where(value > 0, value, torch.inf).min().double()
            self.least_kept = torch.minimum(self.least_kept, smallest)

    def row(self) -> dict[str, Any]:
        """Return the interval's `train/` and `tokens_l0/` figures over all ranks. Collective."""
        ranks = self._ranks
        sums = dict(zip(self.NAMES, ranks.sum(self.scalars).tolist(), strict=True))
        n, steps = sums["tokens"], sums["steps"]
        mean_D = ranks.sum(self.sum_D) / n
        variance = sums["square"] - n * float(mean_D.square().sum())
        p5, p50, p95 = histogram_percentiles(ranks.sum(self.l0_histogram), (0.05, 0.5, 0.95))
        row = {
            "train/loss": sums["loss"] / steps,
            "train/fvu": sums["error"] / variance if variance > 0 else float("nan"),
            "train/aux": sums["aux"] / steps,
            "train/l0": sums["matches"] / n,
            "train/threshold": -float(ranks.max(-self.least_kept)),
            "train/grad_norm": sums["grad_norm"] / steps,
            "tokens_l0/p5": p5,
            "tokens_l0/p50": p50,
            "tokens_l0/p95": p95,
        }
        if sums["budget"] > 0:
            row["train/budget_used"] = sums["matches"] / sums["budget"]
        return row

    def reset(self) -> None:
        """Start the next interval."""
        for tensor in (self.scalars, self.sum_D, self.l0_histogram):
            tensor.zero_()
        self.least_kept.fill_(torch.inf)

    def state(self) -> State:
        """Return the sums of every rank, stacked in rank order. Collective."""
        names = ("scalars", "sum_D", "l0_histogram", "least_kept")
        return State({name: self._ranks.gather(getattr(self, name)) for name in names}, {})

    def load_state(self, state: State) -> None:
        """Take this rank's sums; on another number of ranks the first rank takes all of them."""
        for name, stacked in state.shared.items():
            own = getattr(self, name)
            if len(stacked) == self._ranks.size:
                own.copy_(stacked[self._ranks.rank])
            elif self._ranks.is_first:
                own.copy_(stacked.min(0).values if name == "least_kept" else stacked.sum(0))


def _sum_of_squares(norm_N: Tensor) -> Tensor:
    return norm_N.double().square().sum()


def firing_row(firing: Firing, dead_window: int, *, n_features: int, ranks: Ranks) -> dict[str, Any]:
    """Return the interval's dead features and density figures. Collective."""
    dead = int(ranks.features.sum(firing.dead_F(dead_window).sum()))
    n_tokens = max(int(firing.interval_tokens), 1)
    density_F = ranks.features.gather_slices(firing.interval_F, n_features).double() / n_tokens
    row: dict[str, Any] = {"train/dead_features": dead, "train/dead_fraction": dead / len(density_F)}
    row |= {f"density/{name}": value for name, value in density_figures(density_F).items()}
    row["density/histogram"] = density_histogram(density_F, n_tokens)
    return row


def spread_notice(row: dict[str, Any]) -> str:
    """Return a warning about lanes that read their text at very different speeds, empty where none do."""
    if row.get("data/epoch_spread", 0) <= LARGEST_SPREAD:
        return ""
    return (
        f"lanes are {row['data/epoch_spread']:.1f} epochs apart, the slowest has read its text "
        f"{row['data/epochs']:.1f} times: some text is trained on more often than other. Lower harvest.lanes, or give "
        "more text."
    )
