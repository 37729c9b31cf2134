"""The price of a match: what penalised sparsifiers weigh sparsity with, steered so that L0 comes to k.

Ours. L0 is compared, as a logarithm, with an aim: k, or what falls to k from a larger L0 of the first batch over the
first part of the run. Two things answer a deviation. The thresholds move together, at any pace in that first part and
afterwards by the learning rate a step or, in short runs, a little more; and the price changes until that is not needed.
"""

import math

import torch
from torch import Tensor

from sae_train.sae.step_info import StepInfo

AT_ONCE = 1.0
"""Power of L0 over its aim by which the price answers at once."""
IN_TIME = 3.0
"""By how much the price's logarithm grows while thresholds' logarithms are pushed by 1."""
NUDGE = 0.3
"""Step of the thresholds' logarithms in answer to a deviation of 1 while the aim moves."""
SLOWEST = 3.0
"""Steps of thresholds' logarithms may add up to this over a run however small the learning rate."""
FARTHEST = 15.0
"""How far the price's logarithm may go from where it began, where L0 cannot be reached."""
WORST = 1.0
"""Largest deviation, as a logarithm, that is answered."""
LEAST = 1e-3
"""L0 below which it counts as this: its logarithm must be finite."""


class Price:
    """One number for the batch of all ranks, on the device; nothing is read back to the host.

    Attributes:
        nudge: by how much the logarithms of thresholds are to move before the next step, a scalar.
        size: mean value of what fired in the last step.

    Args:
        first: price at the start.
        settle: share of the run over which the aim moves.
        fixed: a price that is not steered; it rises from 0 over that share.
    """

    def __init__(self, first: float, *, settle: float, device: torch.device, fixed: float | None = None) -> None:
        self._settle, self._fixed, self._first = settle, fixed, math.log(first)
        self._log_price = torch.full((), math.log(first), dtype=torch.float64, device=device)
        self._deviation = torch.zeros((), dtype=torch.float64, device=device)
        self._log_first = torch.zeros((), dtype=torch.float64, device=device)
        self.nudge = torch.zeros((), dtype=torch.float64, device=device)
        self.size = torch.zeros((), dtype=torch.float64, device=device)

    def now(self, info: StepInfo) -> Tensor:
        """Return the price of a step, from the steps before it, a scalar in float64."""
        if self._fixed is not None:
            rise = 1.0 - self._left(info)
            return torch.full_like(self._log_price, self._fixed * rise)
        return (self._log_price + AT_ONCE * self._deviation).exp()

    def update(self, l0: Tensor, *, size: Tensor, k: float | None, info: StepInfo) -> None:
        """Move the price and the next nudge by a step's L0.

        Args:
            l0: mean over the batch of all ranks, scalar.
            size: mean value of what fires, scalar; not a number if nothing does.
            k: what it is to be at this step.
            info: where in the run that step was.
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
        """Return which share of the time to settle is left."""
        done = info.tokens / info.total_tokens
        return max(0.0, 1 - done / self._settle) if self._settle > 0 else 0.0

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run must know, for a checkpoint."""
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
