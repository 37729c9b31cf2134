"""Feature Choice: each feature keeps its m_j largest affinities of the batch (Ayonrinde 2024, arXiv 2411.02124).

Budgets are equal or follow Zipf's law in the rank of a feature. The paper publishes neither the law's constants nor the
assignment of ranks to features. Our reconstruction: cap, floor and rounding, and ranks and law that are frozen from the
densities of a Mutual Choice phase. Without such a phase feature j has rank j, and the law is given or a default.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import FeatureChoiceConfig, SaeConfig, ZipfBudgetConfig
from sae_train.config.budget import LARGEST_EXPONENT, LEAST_R2
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import SparseCode
from sae_train.sae.random import keyed_uniform
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.state import State
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.sae.zipf_budget import law_of, round_systematically, water_fill, zipf_mass
from sae_train.sae.zipf_fit import ZipfFit, fit_zipf
from sae_train.sparsifiers.base import Export
from sae_train.sparsifiers.k_schedule import KSchedule
from sae_train.sparsifiers.mutual_choice import MutualChoice


class FeatureChoice(MutualChoice):
    """Mutual Choice for the share `after` of the tokens, then one budget a feature. They sum to the batch's budget."""

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        super().__init__(config, sizes, ranks)
        self._zipf = config.budget if isinstance(config.budget, ZipfBudgetConfig) else None
        self._after = config.sparsifier.after if isinstance(config.sparsifier, FeatureChoiceConfig) else 0.0
        self._rank_F = torch.arange(sizes.n_features) if self._after == 0 else None
        self._fit: ZipfFit | None = None
        self._split: tuple[int, Tensor] | None = None

    @classmethod
    def problems(cls, config: SaeConfig, sizes: SaeSizes) -> list[str]:
        found, schedule = super().problems(config, sizes), KSchedule.of(config)
        if found or schedule is None or not isinstance(config.budget, ZipfBudgetConfig):
            return found
        n_features, n_tokens = sizes.n_features, sizes.batch_tokens
        cap, floor = config.budget.cap, config.budget.floor
        least, most = schedule.least, schedule.most
        if cap is not None and cap * n_features < most:
            found.append(
                f"budget.cap={cap:g}: {n_features} features that fire on at most that share of the tokens cannot reach "
                f"k={most:g}. The smallest cap that works is {_round_up(most / n_features):g}."
            )
        if floor is not None and floor * n_features > least * n_tokens:
            found.append(
                f"budget.floor={floor:g}: {n_features} features with that many matches a batch need more than the "
                f"{least * n_tokens:g} that k={least:g} gives {n_tokens} tokens. The largest floor that works is "
                f"{_round_down(least * n_tokens / n_features):g}."
            )
        return found

    def select(self, inputs: StepInputs) -> SparseCode:
        info, ranks = inputs.info, inputs.ranks
        if self._rank_F is None and info.tokens >= self._after * info.total_tokens:
            density_F = ranks.features.gather_slices(inputs.firing.density_F, self.n_features)
            self._rank_F = _ranks_by_density(density_F)
            if self._zipf is not None and self._zipf.is_open:
                self._fit = _common_fit(density_F, ranks)
        if self._rank_F is None:
            return super().select(inputs)
        budget = self.budget(info)
        budget_F = round_systematically(
            self._matches(budget, info.batch_tokens),
            total=budget,
            u=keyed_uniform(info.seed, "feature_choice", info.step),
        )
        lo, hi = ranks.features.slice(self.n_features)
        matches = kernels.select_columns(inputs.pre_NF, budget_F=budget_F[lo:hi], capacity=self.capacity, ranks=ranks)
        return self.code(matches, inputs)

    def export(self, sae: TrainableAutoencoder, info: StepInfo) -> Export:
        return replace(super().export(sae, info), share_F=self.shares(info), notes=self._notes())

    def shares(self, info: StepInfo) -> Tensor | None:
        """Return each feature's budget over the batch's tokens [F], float64; None in the Mutual Choice phase."""
        if self._rank_F is None:
            return None
        return self._matches(self.budget(info), info.batch_tokens) / info.batch_tokens

    def _notes(self) -> dict[str, Any]:
        """Return the law of the budgets, with r2 where it was fitted to Mutual Choice's densities."""
        if self._zipf is None or self._rank_F is None:
            return {}
        exponent, shift = self._law(self._zipf)
        fitted = {} if self._fit is None else {"r2": self._fit.r2}
        return {"budget_law": {"exponent": exponent, "shift": shift} | fitted}

    def state(self) -> State:
        ranked = {} if self._rank_F is None else {"rank": self._rank_F}
        fitted = {} if self._fit is None else {"fit": torch.tensor(self._fit, dtype=torch.float64)}
        return State(ranked | fitted, {})

    def load_state(self, state: State) -> None:
        if "rank" in state.shared:
            self._rank_F = state.shared["rank"].cpu()
        if "fit" in state.shared:
            self._fit = ZipfFit(*state.shared["fit"].tolist())

    def _matches(self, budget: int, n_tokens: int) -> Tensor:
        """Return each feature's real-valued budget [F]; they sum to `budget`."""
        if self._split is None or self._split[0] != budget:
            self._split = budget, self._matches_by_rank(budget, n_tokens)
        assert self._rank_F is not None, "features have ranks from the phase change on"
        return self._split[1][self._rank_F]

    def _matches_by_rank(self, budget: int, n_tokens: int) -> Tensor:
        n_features, zipf = self.n_features, self._zipf
        even = budget / n_features
        if zipf is None:
            return torch.full((n_features,), even, dtype=torch.float64)
        exponent, shift = self._law(zipf)
        cap = max(0.10, 4 * even / n_tokens) if zipf.cap is None else zipf.cap
        cap = max(min(cap, 1.0) * n_tokens, even)
        floor = min(1.0, cap) if zipf.floor is None else zipf.floor
        mass_F = zipf_mass(n_features, exponent=exponent, shift=shift)
        return water_fill(mass_F, total=budget, floor=min(floor, even), cap=cap)

    def _law(self, zipf: ZipfBudgetConfig) -> tuple[float, float]:
        """Return exponent and shift: as fitted, else as given, else by default."""
        if self._fit is not None:
            return self._fit.exponent, self._fit.shift
        return law_of(zipf, n_features=self.n_features)


def _common_fit(density_F: Tensor, ranks: Ranks) -> ZipfFit | None:
    """Return the first rank's fit to the densities of all features, so that budgets do not differ by rounding.

    None where there is no fit or densities do not follow the law. Then budgets follow the default law.
    """
    fit = fit_zipf(density_F)
    if fit is not None and (fit.r2 < LEAST_R2 or not 0 <= fit.exponent <= LARGEST_EXPONENT):
        fit = None
    told = torch.tensor([math.nan] * 3 if fit is None else fit, dtype=torch.float64, device=density_F.device)
    told = ranks.broadcast(told, 0)
    return None if bool(told.isnan().any()) else ZipfFit(*told.tolist())


def _ranks_by_density(density_F: Tensor) -> Tensor:
    """Return each feature's rank [F], 0 for the densest, ties to the lower feature. The host reads it once in a run."""
    order = density_F.sort(descending=True, stable=True).indices.cpu()
    rank_F = torch.empty_like(order)
    rank_F[order] = torch.arange(len(order))
    return rank_F


def _round_up(value: float) -> float:
    """Return a number rounded up, so that the digits in a message work when they are typed."""
    return float(f"{value * (1 + 1e-5):.5g}")


def _round_down(value: float) -> float:
    return float(f"{value * (1 - 1e-5):.5g}")
