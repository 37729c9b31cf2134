"""Where in the run a step is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """A step's place in the run: host integers, the same on every rank."""

    step: int
    """From 0."""
    tokens: int
    """Tokens trained on before this step, all ranks."""
    total_tokens: int
    """Tokens of the whole run."""
    batch_tokens: int
    """Tokens of the global batch."""
    learning_rate: float
    """Of this step."""
    seed: int
    """The run's `seed`."""
