"""The price of a match: the weight of a penalised sparsifier's penalty, steered so that L0 comes to k.

Ours. The logarithm of L0 is compared with an aim. The aim is k. Where the first batch has a larger L0, the aim falls
from there to k over the first part of the run. Two controls answer a deviation:

- The thresholds move together. In the first part they may move at any pace, afterwards by the learning rate a step, or
  a little more in short runs.
- The price changes until the thresholds need not move.
"""

import math

import torch
from torch import Tensor

from sae_train.sae.step_info import StepInfo

AT_ONCE = 1.0
"""Exponent of L0 over its aim in the immediate factor of the price."""
IN_TIME = 3.0
"""Growth of the price's logarithm for each unit by which thresholds' logarithms move."""
NUDGE = 0.3
"""Step of the thresholds' logarithms at a deviation of 1 while the aim moves."""
SLOWEST = 3.0
"""Sum over the run of the steps that thresholds' logarithms may make, however small the learning rate."""
FARTHEST = 15.0
"""Largest distance of the price's logarithm from its start, for an L0 that cannot be reached."""
WORST = 1.0
"""Largest deviation, as a logarithm; a larger one counts as this."""
LEAST = 1e-3
"""Smallest L0; a smaller one counts as this, because its logarithm must be finite."""


class Price:
    """The price of the batch of all ranks, a scalar on the device. The host never reads it.

    `Penalised` creates one and updates it once a step.

    Attributes:
        nudge: change of the thresholds' logarithms before the next step, a scalar.
        size: mean value of the matches of the last step, a scalar.

    Args:
        first: price at the start.
        settle: share of the run over which the aim moves.
        device: device of the price.
        fixed: a price that is not steered and rises from 0 over that share; None steers it.
    """

    def __init__(self, first: float, *, settle: float, device: torch.device, fixed: float | None = None) -> None:
        self._settle, self._fixed, self._first = settle, fixed, math.log(first)
        self._log_price = torch.full((), math.log(first), dtype=torch.float64, device=device)
        self._deviation = torch.zeros((), dtype=torch.float64, device=device)
        self._log_first = torch.zeros((), dtype=torch.float64, device=device)
        self.nudge = torch.zeros((), dtype=torch.float64, device=device)
        self.size = torch.zeros((), dtype=torch.float64, device=device)

    def now(self, info: StepInfo) -> Tensor:
        """Return the price of a step, which depends on the steps before it, a float64 scalar."""
        if self._fixed is not None:
            rise = 1.0 - self._left(info)
            return torch.full_like(self._log_price, self._fixed * rise)
        return (self._log_price + AT_ONCE * self._deviation).exp()

    def update(self, l0: Tensor, *, size: Tensor, k: float | None, info: StepInfo) -> None:
        """Move the price and the next nudge by a step's L0.

        Args:
            l0: mean number of matches a token over the batch of all ranks, a scalar.
            size: mean value of the matches, a scalar; NaN without a match.
            k: the number of matches a token to steer to; None where the price is fixed.
            info: position of that step.
        """
        self.size = torch.where(size.isfinite(), size, self.size)
        if k is None:  # the price is fixed
            return
        log_l0 = l0.double().clamp_min(LEAST).log()
        if info.step == 0:
            self._log_first = log_l0.clamp_min(math.log(k))
        left = self._left(info)
        aim = math.log(k) + left * (self._log_first - math.log(k))
        self._deviation = (log_l0 - aim).clamp(-WORST, WORST)
        pace = max(info.learning_rate, SLOWEST * info.batch_tokens / info.total_tokens)
        wanted = NUDGE * self._deviation
        allowed = wanted.clamp(-pace, pace)
        self.nudge = wanted if left > 0 else allowed
        self._log_price = (self._log_price + IN_TIME * allowed).clamp(self._first - FARTHEST, self._first + FARTHEST)

    def _left(self, info: StepInfo) -> float:
        """Return the share of the settling time that is left."""
        done = info.tokens / info.total_tokens
        return max(0.0, 1 - done / self._settle) if self._settle > 0 else 0.0

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run must restore."""
        return {
            "log_price": self._log_price,
            "deviation": self._deviation,
            "log_first": self._log_first,
            "nudge": self.nudge,
            "size": self.size,
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `state()`."""
        device = self.nudge.device
        self._log_price, self._deviation, self._log_first, self.nudge, self.size = (
            state[name].to(device) for name in ("log_price", "deviation", "log_first", "nudge", "size")
        )
