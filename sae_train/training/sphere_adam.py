"""Adam with the decoder's projection and normalisation inside its pass, where compiled kernels can run."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sae_train.config import OptimizerConfig
from sae_train.kernels.backend import uses_numba, uses_triton
from sae_train.sae.trainable import TrainableAutoencoder
from sae_train.training.optimizer import Adam


def build_optimizer(dictionary: TrainableAutoencoder, config: OptimizerConfig, *, rates: dict[str, float]) -> Adam:
    """Return the optimizer of `dictionary`; see Adam."""
    fits = dictionary.has_unit_norms and dictionary.W_dec.dtype == torch.float32
    is_compiled = uses_triton(dictionary.W_dec) or uses_numba(dictionary.W_dec)
    return (SphereAdam if fits and is_compiled else Adam)(dictionary, config, rates=rates)


def _kernels(rows: Tensor) -> ModuleType:
    if uses_triton(rows):
        from sae_train.kernels import triton_adam

        return triton_adam
    from sae_train.kernels import numba_adam

    return numba_adam


class SphereAdam(Adam):
    """Adam whose decoder rows stay at unit norm within the step: its gradient is never rewritten, its rows move once.

    Numbers are those of Adam but for rounding; a halted step leaves rows as they are, to the bit. The state is Adam's.
    """

    def project(self) -> None:
        """Measure the decoder's gradient along its rows and beside them: `step` takes off what lies along."""
        gradient = self._dictionary.W_dec.grad
        if gradient is not None:
            weight = self._dictionary.W_dec.detach()
            known = self._dictionary.workspace.noted(gradient, "along_rows")  # of rows that have not moved since
            self._along_F, self._square_F = known or _kernels(weight).along_rows(gradient, weight)

    def normalise(self) -> None:
        """Do nothing: `step` did."""

    def _square(self, name: str, gradient: Tensor) -> Tensor:
        if name == "W_dec":
            square_F: Tensor = self._square_F
        elif gradient.dim() == 2 and uses_numba(gradient):
            from sae_train.kernels import numba_adam

            known: Tensor | None = self._dictionary.workspace.noted(gradient, "squares")
            square_F = numba_adam.squares(gradient) if known is None else known
        else:
            return super()._square(name, gradient)
        return square_F.double().sum()

    def _move(
        self, names: list[str], given: dict[str, Tensor], *, lr: float, scale: Tensor | None, halted: Tensor
    ) -> None:
        betas = {"beta1": self._config.beta1, "beta2": self._config.beta2, "eps": self._config.eps}
        numbers = {"lr": lr, "scale": scale, "halted": halted, **betas}
        others = [name for name in names if not self._move_alone(name, given[name], numbers)]
        if others:
            super()._move(others, given, lr=lr, scale=scale, halted=halted)

    def _move_alone(self, name: str, gradient: Tensor, numbers: dict[str, Any]) -> bool:
        """Move a parameter in a pass of its own, if it has one, and return whether it has.

        Rows that the step read in bf16 are left in that for the next one, while they are in cache.
        """
        weight, own, workspace = self._named[name].detach(), self._state[name], self._dictionary.workspace
        is_decoder = name == "W_dec"
        if not is_decoder and (weight.dim() != 2 or uses_triton(weight) or not uses_numba(weight)):
            return False
        known = "bf16" if is_decoder else "rounded"
        rounded = workspace.noted(weight, known)
        own["step"].add_(1)
        moments = own["exp_avg"], own["exp_avg_sq"]
        if is_decoder:
            more = {} if rounded is None else {"rounded_FD": rounded}
            _kernels(weight).move(weight, gradient, self._along_F, *moments, step=own["step"], **numbers, **more)
        else:
            _kernels(weight).move_free(weight, gradient, *moments, step=own["step"], **numbers, rounded=rounded)
        own["step"].sub_(numbers["halted"].float())
        if rounded is not None:  # unmoved like the weight, where the step halted
            workspace.note(weight, **{known: rounded})
        return True
