"""The flag that stops learning once a loss or gradient is not finite, with statistics of the batch.

The flag lives on the device. Steps after a non-finite one change nothing until the host reads the flag, at the next row
of metrics or checkpoint.
"""

import math

import torch
from torch import Tensor

from sae_train.errors import StoppedByNumbers
from sae_train.ranks.interface import Ranks

FACTS = ("step", "loss", "grad_norm", "bad_activations", "largest_norm", "tokens")


class NonFinite:
    """Watches the loss and gradient norm of every step of one SAE. A `Learner` makes one.

    Attributes:
        flag: scalar bool on the device, true from the first non-finite step on.
    """

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), dtype=torch.bool, device=device)
        self._facts = torch.zeros(len(FACTS), dtype=torch.float64, device=device)

    @torch.no_grad()
    def watch(self, *, step: int, loss: Tensor, grad_norm: Tensor, norm_N: Tensor) -> None:
        """Set the flag if this step is not finite.

        Args:
            step: number of the step, from 0.
            loss: over all ranks, scalar.
            grad_norm: over all ranks, scalar.
            norm_N: norms of this rank's activations.
        """
        if loss.device.type == "cpu" and math.isfinite(float(loss)) and math.isfinite(float(grad_norm)):
            return  # on a CPU the host reads the values without a wait
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        norm_N = norm_N.double()
        facts = torch.stack([
            torch.full_like(grad_norm, step, dtype=torch.float64),
            loss.double(),
            grad_norm.double(),
            (~norm_N.isfinite()).sum().double(),
            norm_N.nan_to_num(nan=0.0, posinf=0.0).max(),
            torch.full_like(grad_norm, len(norm_N), dtype=torch.float64),
        ])  # fmt: skip
        self._facts = torch.where(self.flag | ~bad, self._facts, facts)
        self.flag = self.flag | bad

    def check(self, ranks: Ranks) -> None:
        """Raise on every rank if the flag is set. Collective only then: the flag is equal on all ranks.

        Raises:
            StoppedByNumbers: with the step, the loss and statistics of the batch.
        """
        if not bool(self.flag):
            return
        facts_R = ranks.gather(self._facts)
        facts = dict(zip(FACTS, facts_R[0].tolist(), strict=True))
        bad, tokens = facts_R[:, FACTS.index("bad_activations")], facts_R[:, FACTS.index("tokens")]
        where = "" if ranks.size == 1 or not bad.any() else f" (most of them on rank {int(bad.argmax())})"
        raise StoppedByNumbers(
            f"loss is {facts['loss']:g} and the gradient's norm {facts['grad_norm']:g} at step "
            f"{facts['step']:.0f}: not finite. Of the batch's {float(tokens.sum()):.0f} activations "
            f"{float(bad.sum()):.0f} are not finite{where}; the largest norm is "
            f"{float(facts_R[:, FACTS.index('largest_norm')].max()):.3g} (mean square 1 if scaled). That step changed "
            "no weights, and the last checkpoint is from before it. Lower optimizer.lr, and check the activations."
        )
