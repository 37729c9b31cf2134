"""The price of a match: what penalised sparsifiers weigh sparsity with, steered so that L0 comes to k.

Ours. L0 is compared, as a logarithm, with an aim: k, or what falls to k from a larger L0 of the first batch over the
first part of the run. Two things answer a deviation. The thresholds move together, at any pace while the aim moves and
afterwards no faster than the learning rate lets the optimizer move them; and the price changes until that is not needed
any more: in the end the price alone holds L0. Both act in units of the learning rate, and slow down with it.
"""

import math

import torch
from torch import Tensor

from sae_train.sae.moment import Moment

AT_ONCE = 1.0
"""Power of L0 over its aim by which the price answers at once."""
IN_TIME = 3.0
"""By how much the price's logarithm grows in 1 / learning rate steps in which thresholds are pushed all the way."""
NUDGE = 0.3
"""Step of the thresholds' logarithms in answer to a deviation of 1 while the aim moves."""
WORST = 1.0
"""Largest deviation, as a logarithm, that is answered."""
LEAST = 1e-3
"""L0 below which it counts as this: its logarithm must be finite."""


class Price:
    """One number for the batch of all ranks, on the device; nothing is read back to the host.

    Attributes:
        nudge: by how much the logarithms of thresholds are to move before the next step, a scalar.
        size: mean value of what fired in the last step.
    """

    def __init__(self, first: float, *, settle: float, device: torch.device) -> None:
        self._settle = settle
        self._log_price = torch.full((), math.log(first), dtype=torch.float64, device=device)
        self._deviation = torch.zeros((), dtype=torch.float64, device=device)
        self._log_first = torch.zeros((), dtype=torch.float64, device=device)
        self.nudge = torch.zeros((), dtype=torch.float64, device=device)
        self.size = torch.zeros((), dtype=torch.float64, device=device)

    def now(self) -> Tensor:
        """Return the price that follows from the steps so far, a scalar in float64."""
        return (self._log_price + AT_ONCE * self._deviation).exp()

    def look(self, l0: Tensor, *, size: Tensor, k: float, moment: Moment) -> None:
        """Take notice of a step's L0.

        Args:
            l0: mean over the batch of all ranks, scalar.
            size: mean value of what fires, scalar; not a number if nothing does.
            k: what it is to be at this moment.
            moment: where in the run that step was.
        """
        self.size = torch.where(size.isfinite(), size, self.size)
        log_l0 = l0.double().clamp_min(LEAST).log()
        if moment.step == 0:
            self._log_first = log_l0.clamp_min(math.log(k))
        done = moment.tokens / moment.total_tokens
        left = max(0.0, 1 - done / self._settle) if self._settle > 0 else 0.0
        aim = math.log(k) + left * (self._log_first - math.log(k))
        self._deviation = (log_l0 - aim).clamp(-WORST, WORST)
        pace = moment.learning_rate
        wanted = NUDGE * self._deviation
        allowed = wanted.clamp(-pace, pace)
        self.nudge = wanted if left > 0 else allowed
        self._log_price = self._log_price + IN_TIME * allowed

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
