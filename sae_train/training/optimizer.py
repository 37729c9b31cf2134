"""Adam on the dictionary, with global clipping, that turns into a no-op once a flag on the device is set."""

import torch
from torch import Tensor

from sae_train.config import OptimizerConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.trainable import REPLICATED, TrainableAutoencoder


class Adam:
    """Adam (arXiv 1412.6980), fused: every parameter and moment moves once a step.

    The gradient is scaled so that its global norm is at most `clip`, inside the same pass.

    Args:
        rates: of parameters by name, as a share of each step's learning rate; 1 for those that are not named.
    """

    def __init__(self, dictionary: TrainableAutoencoder, config: OptimizerConfig, *, rates: dict[str, float]) -> None:
        self._dictionary, self._named = dictionary, dict(dictionary.named_parameters())
        self._config = config
        self._rates = {name: rates.get(name, 1.0) for name in self._named}
        self._state = {  # moments exist from the start, so that a checkpoint may hold them
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for name, parameter in self._named.items()
        }

    def project(self) -> None:
        """Take off the decoder's gradient what would change the norms of its rows; see TrainableAutoencoder."""
        self._dictionary.project_gradient()

    def normalise(self) -> None:
        """Bring the decoder's rows back to unit norm after a step; see TrainableAutoencoder."""
        self._dictionary.normalise()

    def gradient_norm(self, ranks: Ranks) -> Tensor:
        """Return the norm of the gradients of the whole dictionary, a scalar on the device."""
        given = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        squares = {name: self._square(name, gradient) for name, gradient in given.items()}
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
        given = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        scale = (norm / self._config.clip).clamp_min(1.0) if self._config.clip > 0 else None
        if scale is not None and next(iter(given.values())).dtype == torch.float64:  # whose pass has a float32 scale
            torch._foreach_div_(list(given.values()), scale)
            scale = None
        with torch.no_grad():
            for rate in dict.fromkeys(self._rates.values()):
                names = [name for name in given if self._rates[name] == rate]
                if names:
                    self._move(names, given, lr=lr * rate, scale=scale, halted=halted)
        self._dictionary.workspace.keep(given.values())
        for parameter in self._named.values():
            parameter.grad = None

    def _square(self, name: str, gradient: Tensor) -> Tensor:
        """Return a parameter's share of the squared norm, float64."""
        norm: Tensor = torch.linalg.vector_norm(gradient)
        return norm.double().square()

    def _move(
        self, names: list[str], given: dict[str, Tensor], *, lr: float, scale: Tensor | None, halted: Tensor
    ) -> None:
        """Update parameters in one pass: the operation that torch.optim.Adam(fused=True) calls, as it calls it.

        Without the class around it, which imports torch's compiler (1.4 s) and knows no division or halt but a
        GradScaler's.
        """
        steps = [self._state[name]["step"] for name in names]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            [self._named[name] for name in names], [given[name] for name in names],
            [self._state[name]["exp_avg"] for name in names], [self._state[name]["exp_avg_sq"] for name in names],
            [], steps, lr=lr, beta1=self._config.beta1, beta2=self._config.beta2, weight_decay=0.0,
            eps=self._config.eps, amsgrad=False, maximize=False,
            grad_scale=None if scale is None else scale.float(), found_inf=halted.float(),
        )  # fmt: skip
        torch._foreach_sub_(steps, [halted.float()] * len(steps))
        torch.autograd.graph.increment_version([self._named[name] for name in names])  # torch's operation does not

    def state(self) -> dict[str, Tensor]:
        """Return step counts and moments by parameter and name, 'W_enc.exp_avg'."""
        return {f"{name}.{key}": value for name, own in self._state.items() for key, value in own.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, own in self._state.items():
            for key in own:
                own[key].copy_(state[f"{name}.{key}"])
