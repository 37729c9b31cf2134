"""The position of a step in the run, and the tensors that a step starts from."""

from dataclasses import dataclass

from torch import Tensor

from sae_train.kernels import PreActivations
from sae_train.ranks.interface import Ranks
from sae_train.sae.firing import Firing


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """The position of a step in the run: host numbers, the same on every rank. The learner makes one a step."""

    step: int
    """Number of the step, from 0."""
    tokens: int
    """Tokens trained on before this step, over all ranks."""
    total_tokens: int
    """Tokens of the whole run."""
    batch_tokens: int
    """Tokens of the global batch."""
    learning_rate: float
    """Learning rate of this step."""
    lost_rate: float = 0.0
    """Part of the learning rate that the decay has taken off at this step."""
    seed: int
    """The SAE's `seed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The tensors of a step on one rank, without a graph. The learner makes it; sparsifier and auxiliary loss read it.

    Example: with 2 rows of ranks and 4 columns, a batch of 2048 tokens and 6144 features, a rank has N = 1024 and
    F = 1536.
    """

    x_ND: Tensor
    """Normalised activations of this rank's tokens. Every rank holds equally many tokens."""
    pre_NF: PreActivations
    """Pre-activations of this rank's tokens and features."""
    slope_NF: Tensor | None = None
    """Derivative of the language model's loss with respect to each feature's value, where gradients are harvested.
    The sparsifier may overwrite it."""
    info: StepInfo
    firing: Firing
    """Counters of this rank's features over the steps before this one."""
    ranks: Ranks
    """The grid of ranks that hold the other tokens and the other features of the batch."""
