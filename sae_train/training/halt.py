"""The flag that stops learning when numbers stop being finite, and what it remembers of the batch.

It lives on the device: steps after a bad one change nothing until the host looks, at the next row or checkpoint.
"""

import torch
from torch import Tensor

from sae_train.errors import StoppedByNumbers

FACTS = ("step", "loss", "grad_norm", "bad_activations", "largest_norm", "tokens")


class Halt:
    """Watches every step; `flag` is true from the first bad one on."""

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), dtype=torch.bool, device=device)
        self._facts = torch.zeros(len(FACTS), dtype=torch.float64, device=device)

    @torch.no_grad()
    def watch(self, *, step: int, loss: Tensor, grad_norm: Tensor, x_ND: Tensor) -> None:
        """Look at a step's loss and gradient norm (scalars, over all ranks) and at this rank's activations."""
        norm_N = x_ND.norm(dim=1).double()
        facts = torch.stack([
            norm_N.new_tensor(float(step)),
            loss.double(),
            grad_norm.double(),
            (~norm_N.isfinite()).sum().double(),
            norm_N.nan_to_num(nan=0.0, posinf=0.0).max(),
            norm_N.new_tensor(float(len(x_ND))),
        ])  # fmt: skip
        bad = ~(loss.isfinite() & grad_norm.isfinite())
        self._facts = torch.where(self.flag | ~bad, self._facts, facts)
        self.flag = self.flag | bad

    def check(self) -> None:
        """Raise if the flag is set.

        Raises:
            StoppedByNumbers: with the step, the loss and what the batch looked like.
        """
        if not bool(self.flag):
            return
        facts = dict(zip(FACTS, self._facts.tolist(), strict=True))
        raise StoppedByNumbers(
            f"loss is {facts['loss']:g} and the gradient's norm {facts['grad_norm']:g} at step {facts['step']:.0f}: "
            f"not finite. Of this rank's {facts['tokens']:.0f} activations {facts['bad_activations']:.0f} are not "
            f"finite; the largest norm is {facts['largest_norm']:.3g} (mean square 1 when scaled). It changed no "
            "weights, and the last checkpoint is from before it. Lower optimizer.lr, and check the activations."
        )
