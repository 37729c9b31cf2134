"""Adam on the dictionary, with global clipping, that turns into a no-op once a flag on the device is set."""

import torch
from torch import Tensor

from sae_train.config import OptimizerConfig
from sae_train.ranks import Ranks
from sae_train.sae.dictionary import REPLICATED, Dictionary


class Adam:
    """Adam (arXiv 1412.6980), fused: every parameter and moment moves once a step.

    The gradient is scaled so that its global norm is at most `clip`, inside the same pass.

    Args:
        rates: of parameters by name, as a share of each step's learning rate; 1 for those that are not named.
    """

    def __init__(self, dictionary: Dictionary, config: OptimizerConfig, *, rates: dict[str, float]) -> None:
        self._named = dict(dictionary.named_parameters())
        self._clip = config.clip
        by_rate: dict[float, list[Tensor]] = {}
        for name, parameter in self._named.items():
            by_rate.setdefault(rates.get(name, 1.0), []).append(parameter)
        self._rates = list(by_rate)
        self._adam = torch.optim.Adam(
            [{"params": group} for group in by_rate.values()],
            lr=config.lr or 0.0,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        for parameter in self._named.values():  # moments exist from the start, so that a checkpoint may hold them
            self._adam.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def gradient_norm(self, ranks: Ranks) -> Tensor:
        """Return the norm of the gradients of the whole dictionary, a scalar on the device."""
        squares = {
            name: torch.linalg.vector_norm(parameter.grad).double().square()
            for name, parameter in self._named.items()
            if parameter.grad is not None
        }
        shared = torch.stack([square for name, square in squares.items() if name not in REPLICATED]).sum()
        whole = [square for name, square in squares.items() if name in REPLICATED]
        return torch.stack([ranks.features.sum(shared), *whole]).sum().sqrt()

    def step(self, *, lr: float, norm: Tensor, halted: Tensor) -> None:
        """Update every parameter from its gradient and drop the gradients.

        Args:
            lr: this step's learning rate.
            norm: global norm of the gradients, scalar.
            halted: scalar bool on the device; where true the step changes nothing.
        """
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = lr * rate
        # the fused step divides gradients by grad_scale and does nothing where found_inf is set (as for GradScaler)
        if self._clip > 0:
            self._divide_gradients((norm / self._clip).clamp_min(1.0))
        setattr(self._adam, "found_inf", halted.float())  # noqa: B010 (not in the stubs)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def _divide_gradients(self, scale: Tensor) -> None:
        """Divide by `scale`: in the update's own pass, but for float64, which has no float64 scale there."""
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        if gradients[0].dtype == torch.float64:
            torch._foreach_div_(gradients, scale)
        else:
            setattr(self._adam, "grad_scale", scale.float())  # noqa: B010 (not in the stubs)

    def state(self) -> dict[str, Tensor]:
        """Return step counts and moments by parameter and name, 'W_enc.exp_avg'."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._named.items()
            for key, value in self._adam.state[parameter].items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            own = self._adam.state[parameter]
            for key in own:
                own[key].copy_(state[f"{name}.{key}"])
