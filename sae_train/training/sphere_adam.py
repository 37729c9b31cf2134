"""Adam with the decoder's projection and normalisation inside its pass, where compiled kernels can run."""

from types import ModuleType

import torch
from torch import Tensor

from sae_train.config import OptimizerConfig
from sae_train.kernels.backend import uses_numba, uses_triton
from sae_train.sae.dictionary import Dictionary
from sae_train.training.optimizer import Adam


def build_optimizer(dictionary: Dictionary, config: OptimizerConfig, *, rates: dict[str, float]) -> Adam:
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
            self._along_F, self._square_F = _kernels(weight).along_rows(gradient, weight)

    def normalise(self) -> None:
        """Do nothing: `step` did."""

    def _square(self, name: str, gradient: Tensor) -> Tensor:
        if name == "W_dec":
            square_F: Tensor = self._square_F
        elif gradient.dim() == 2 and uses_numba(gradient):
            from sae_train.kernels import numba_adam

            square_F = numba_adam.squares(gradient)
        else:
            return super()._square(name, gradient)
        return square_F.double().sum()

    def _move(
        self, names: list[str], given: dict[str, Tensor], *, lr: float, scale: Tensor | None, halted: Tensor
    ) -> None:
        others = [name for name in names if name != "W_dec"]
        if others:
            super()._move(others, given, lr=lr, scale=scale, halted=halted)
        if others == names:
            return
        own = self._state["W_dec"]
        own["step"].add_(1)
        _kernels(given["W_dec"]).move(
            self._named["W_dec"].detach(), given["W_dec"], self._along_F, own["exp_avg"], own["exp_avg_sq"],
            step=own["step"], scale=scale, halted=halted, lr=lr, beta1=self._config.beta1, beta2=self._config.beta2,
            eps=self._config.eps,
        )  # fmt: skip
        own["step"].sub_(halted.float())
