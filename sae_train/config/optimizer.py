"""Settings of the optimizer and of its learning rate schedule."""

from dataclasses import dataclass
from typing import Annotated

from sae_train.config.ranges import Range, Settings

DECAY_RATE = Range(at_least=0, below=1)


@dataclass(kw_only=True, slots=True)
class OptimizerConfig(Settings):
    """Adam (arXiv 1412.6980)."""

    name: str
    lr: Annotated[float | None, Range(above=0)]
    """Peak learning rate. Default: from n_features, tokens and k, by the rule in docs/reports/quality.md."""
    beta1: Annotated[float, DECAY_RATE]
    """Decay of the mean of gradients, a step."""
    beta2: Annotated[float, DECAY_RATE]
    """Decay of the mean of squared gradients, a step."""
    eps: Annotated[float, Range(above=0)]
    """Added to the root of the mean squared gradient before the division."""
    clip: Annotated[float, Range(at_least=0)]
    """Largest global norm of a step's gradient. 0 does not clip."""
    warmup_tokens: Annotated[int | None, Range(at_least=0)]
    """Tokens over which the learning rate rises linearly from 0. Default: a 20th of the run."""
    decay_tokens: Annotated[int | None, Range(at_least=0)]
    """Tokens at the end over which the learning rate falls linearly to 0. Default: a fifth of the run."""
