"""Counters of firings over the global batch, for the features that a rank holds."""

import torch
from torch import Tensor

from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code
from sae_train.sae.state import State


class Firing:
    """Counters of firings over all ranks' tokens; a feature fires on a token where its code is above 0.

    Attributes:
        since_F: int64, tokens since a feature last fired, or since the start.
        density_F: float64, moving average of the share of tokens on which a feature fires. Its bias towards 0 at the
            start is corrected.
        interval_F: int64, firings since `reset_interval`.
        interval_tokens: tokens since `reset_interval`.

    Args:
        n_features: features of this rank.
        half_life_tokens: half-life of the moving average.
    """

    def __init__(self, n_features: int, *, half_life_tokens: float, device: torch.device | str) -> None:
        self.half_life_tokens = half_life_tokens
        self.since_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.density_F = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.interval_F = torch.zeros(n_features, dtype=torch.int64, device=device)
        self.interval_tokens = 0
        self._tokens = 0

    def update(self, code: Code, *, n_tokens: int, ranks: Ranks) -> None:
        """Count one step; `code` holds this rank's tokens, `n_tokens` is the number over all ranks."""
        fired_F = ranks.data.sum(code.firing_counts())
        self.since_F = torch.where(fired_F > 0, 0, self.since_F + n_tokens)
        self._tokens += n_tokens
        share = (1 - 0.5 ** (n_tokens / self.half_life_tokens)) / (1 - 0.5 ** (self._tokens / self.half_life_tokens))
        self.density_F = self.density_F.lerp(fired_F.double() / n_tokens, share)
        self.interval_F = self.interval_F + fired_F
        self.interval_tokens += n_tokens

    def dead_F(self, window: int) -> Tensor:
        """Return a mask [F] of the features that fired on none of the last `window` tokens."""
        return self.since_F >= window

    def reset_interval(self) -> None:
        """Start a new interval, after a log."""
        self.interval_F = torch.zeros_like(self.interval_F)
        self.interval_tokens = 0

    def state(self) -> State:
        """Return the counters [F], and the tokens of the interval and of the run."""
        counts = {"interval_tokens": torch.tensor(self.interval_tokens), "tokens": torch.tensor(self._tokens)}
        return State(counts, {"since": self.since_F, "density": self.density_F, "interval": self.interval_F})

    def load_state(self, state: State) -> None:
        """Continue from a `state()` of these features."""
        device, of_features = self.since_F.device, state.features
        self.since_F, self.density_F, self.interval_F = (
            of_features[key].to(device=device, copy=True) for key in ("since", "density", "interval")
        )
        self.interval_tokens, self._tokens = int(state.shared["interval_tokens"]), int(state.shared["tokens"])
