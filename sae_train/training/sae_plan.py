"""The numbers of each SAE of a run, decided before anything heavy happens: name, width, schedule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_train.config import SaeConfig, SourceConfig
from sae_train.errors import raise_all
from sae_train.harvest.build import StreamFacts
from sae_train.harvest.stream import StreamSite
from sae_train.sae.sizes import SaeSizes
from sae_train.training.names import sae_names
from sae_train.training.schedule import DECAY_SHARE, WARMUP_SHARE, peak_learning_rate

LARGEST_DEAD_WINDOW = 10_000_000
DEAD_WINDOWS_A_RUN = 25
"""A shorter run's dead window is this part of it. With an eighth more features ended dead (docs/reports/quality.md)."""
RULED = ("n_features", "dead_window", "peak_lr", "warmup_tokens", "decay_tokens")
"""Fields of an SAE's plan that a rule decides where the configuration does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaePlan:
    """The settings and numbers of one SAE. `make_plan` creates it; the learner reads it."""

    name: str
    """Name of the SAE, unique in the run."""
    config: SaeConfig
    site: str
    """Label of the site whose activations it learns from."""
    d_model: int
    n_features: int
    batch_tokens: int
    total_tokens: int
    """Tokens of all steps."""
    dead_window: int
    peak_lr: float
    warmup_tokens: int
    decay_tokens: int

    @property
    def sizes(self) -> SaeSizes:
        """The sizes that sparsifiers and losses read."""
        return SaeSizes(
            d_model=self.d_model,
            n_features=self.n_features,
            batch_tokens=self.batch_tokens,
            dead_window=self.dead_window,
        )

    @property
    def parameters(self) -> int:
        """Weights of encoder and decoder, and their biases."""
        return 2 * self.n_features * self.d_model + self.n_features + self.d_model


def sae_plans(
    source: SourceConfig, configs: Sequence[SaeConfig], facts: StreamFacts, *, total: int
) -> dict[str, SaePlan]:
    """Return the plan of each SAE by its name.

    Args:
        configs: the settings of each SAE, all of them at sites that `facts` lists.
        total: tokens of all steps.

    Raises:
        ConfigError: a k is above the width of its dictionary, or two SAEs are equal.
    """
    sized: list[tuple[SaeConfig, StreamSite, int]] = []
    problems: list[str] = []
    for config in configs:
        (site,) = facts.sites_of(config.layer)
        n_features = config.n_features or config.expansion * site.d_model
        sized.append((config, site, n_features))
        problems += config.width_problems(n_features)
    raise_all(list(dict.fromkeys(problems)))
    names = sae_names([(config, site.label, n_features) for config, site, n_features in sized])
    return {
        name: SaePlan(
            name=name,
            config=config,
            site=site.label,
            d_model=site.d_model,
            n_features=n_features,
            batch_tokens=source.batch_tokens,
            total_tokens=total,
            **_ruled(config, n_features=n_features, total=total),
        )
        for name, (config, site, n_features) in zip(names, sized, strict=True)
    }


def _ruled(config: SaeConfig, *, n_features: int, total: int) -> dict[str, Any]:
    """Return the numbers that rules decide where the settings of an SAE do not."""
    optimizer = config.optimizer
    warmup, decay = optimizer.warmup_tokens, optimizer.decay_tokens
    return {
        "dead_window": config.dead_window or max(1, min(LARGEST_DEAD_WINDOW, total // DEAD_WINDOWS_A_RUN)),
        "peak_lr": peak_learning_rate(optimizer, n_features=n_features, tokens=total, k=config.usual_k),
        "warmup_tokens": round(WARMUP_SHARE * total) if warmup is None else warmup,
        "decay_tokens": round(DECAY_SHARE * total) if decay is None else decay,
    }
