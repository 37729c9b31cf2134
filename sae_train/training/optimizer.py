"""Adam on the dictionary, with global clipping, that turns into a no-op once a flag on the device is set."""

from typing import Any

import torch
from torch import Tensor

from sae_train import kernels
from sae_train.config import OptimizerConfig
from sae_train.ranks.interface import Ranks
from sae_train.sae.trainable import REPLICATED, TrainableAutoencoder


class Adam:
    """Adam (arXiv 1412.6980) on every parameter of a dictionary; the trainer creates it and calls it once a step.

    The gradient is scaled so that its global norm is at most `clip`, inside the same pass. Decoder rows of unit norm
    stay at unit norm: what would change their norms is taken off their gradient, and they are renormalised.

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
        self._along_F: Tensor | None = None

    def gradient_norm(self, ranks: Ranks) -> Tensor:
        """Return the norm of the gradients of the whole dictionary, a scalar on the device.

        Of the decoder's unit rows it is the norm of the projected gradient. `step` follows.
        """
        squares = {name: self._square(name, p.grad) for name, p in self._named.items() if p.grad is not None}
        shared = torch.stack([square for name, square in squares.items() if name not in REPLICATED]).sum()
        whole = [square for name, square in squares.items() if name in REPLICATED]
        return torch.stack([ranks.features.sum(shared), *whole]).sum().sqrt()

    def step(self, *, lr: float, norm: Tensor, halted: Tensor) -> None:
        """Update every parameter from its gradient and drop the gradients.

        Args:
            lr: this step's learning rate.
            norm: `gradient_norm` of these gradients, scalar.
            halted: scalar bool on the device; where true the step changes nothing.
        """
        config = self._config
        scale = (norm / config.clip).clamp_min(1.0) if config.clip > 0 else None
        betas = {"beta1": config.beta1, "beta2": config.beta2, "eps": config.eps}
        settings: Any = {"scale": scale, "halted": halted, **betas}
        given = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        decoder = given.pop("W_dec", None) if self._dictionary.has_unit_norms else None
        for rate in dict.fromkeys(self._rates.values()):
            names = [name for name in given if self._rates[name] == rate]
            if names:
                weights = [self._named[name].detach() for name in names]
                moments = ([self._state[name][key] for name in names] for key in ("exp_avg", "exp_avg_sq", "step"))
                kernels.adam(weights, [given[name] for name in names], *moments, lr=lr * rate, **settings)
        if decoder is not None:
            assert self._along_F is not None, "gradient_norm comes first"
            weight, own, rate = self._named["W_dec"].detach(), self._state["W_dec"], self._rates["W_dec"]
            places = weight, decoder, self._along_F, own["exp_avg"], own["exp_avg_sq"]
            kernels.move_unit_rows(*places, step=own["step"], lr=lr * rate, **settings)
            self._along_F = None  # it belongs to these gradients
        self._dictionary.moved()
        for parameter in self._named.values():
            parameter.grad = None

    def _square(self, name: str, gradient: Tensor) -> Tensor:
        """Return a parameter's share of the squared norm, float64."""
        if name == "W_dec" and self._dictionary.has_unit_norms:
            self._along_F, square_F = kernels.along_rows(gradient, self._named[name].detach())
            return square_F.double().sum()
        norm: Tensor = torch.linalg.vector_norm(gradient)
        return norm.double().square()

    def state(self) -> dict[str, Tensor]:
        """Return step counts and moments by parameter and name, 'W_enc.exp_avg'."""
        return {f"{name}.{key}": value for name, own in self._state.items() for key, value in own.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, own in self._state.items():
            for key in own:
                own[key].copy_(state[f"{name}.{key}"])
