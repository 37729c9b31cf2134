"""The interface of a sparsifier: how the pre-activations of a batch become a code.

The learner creates one sparsifier an SAE and calls its members in this order:

| when          | member               | overridden by                                               |
|---------------|----------------------|-------------------------------------------------------------|
| the plan      | `problems`           | allocators, feature_choice                                  |
|               | `matrices_held`      | gradient, penalised ones (measured memory of a step)        |
| once, before  | `extra_parameters`   | jumprelu, gated                                             |
|               | `has_unit_norms`     | relu (norms may be free)                                    |
|               | `reads_all`          | allocators (not), gradient                                  |
| each step     | `before_step`        | penalised ones                                              |
|               | `encode`             | all                                                         |
|               | `after_step`         | allocators                                                  |
| each row      | `figures`            | penalised ones, temporal_mask                               |
|               | `k_at`               | none: a service to the learner                              |
|               | `collapse_advice`    | penalised ones, jumprelu                                    |
| an export     | `export`             | topk, feature_choice, penalised ones, gated                 |
| a checkpoint  | `state`, `load_state`| feature_choice, penalised ones, p_anneal, temporal_mask     |
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from sae_train.config import SaeConfig
from sae_train.errors import raise_all
from sae_train.ranks.interface import Ranks
from sae_train.sae.code import Code
from sae_train.sae.firing import Firing
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.state import State
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sae.trainable import ExtraParameter, TrainableAutoencoder
from sae_train.sparsifiers.k_schedule import KSchedule


class Encoding(NamedTuple):
    """The result of a step's `encode`."""

    code: Code
    """The differentiable code of this rank's tokens and features. Firing counters and L0 are counted on it."""
    decoded: Code
    """The part of `code` that is decoded. It is `code` itself unless the method drops features for a step."""
    penalty: Tensor | None = None
    """This rank's share of a loss that belongs to the method, a scalar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The rule by which the exported autoencoder encodes, on normalised activations."""

    inference: str = "threshold"
    """'threshold' or 'topk'."""
    k: float | None
    """Mean number of active features a token that thresholds aim at; None where a coefficient takes its place."""
    W_enc: Tensor
    """[F, D] encoder rows."""
    b_enc: Tensor
    """[F] encoder biases."""
    threshold_F: Tensor | None = None
    """[F] thresholds that training has learned, +inf for a feature that must never fire. None where it selects."""
    share_F: Tensor | None = None
    """Share of a batch's tokens on which each feature of the whole dictionary may fire, float64. None where all may."""
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON values of this method that summary.json and sae.json hold."""


class Sparsifier(ABC):
    """Decides which features of a token fire: k of them on average, over all tokens of the batch on all ranks.

    `build_sparsifier` creates it. See the module's table for its members and their callers.

    Attributes:
        n_features: features of the whole dictionary.
        schedule: number of matches a token over the run; None where a coefficient takes the place of k.

    Args:
        config: settings of the SAE.
        sizes: sizes of the SAE and of its batches.
        ranks: the grid of ranks, which decides device and features of this sparsifier's own tensors.
    """

    matrices_held: ClassVar[int] = 2
    """Matrices [N, F] that a step holds at most, measured by tests/training/test_memory.py and rounded up."""
    has_unit_norms = True
    """Whether decoder rows are kept at unit norm."""
    reads_all = True
    """Whether it reads every pre-activation. Otherwise those of a bf16 product may find candidates for it."""

    schedule: KSchedule | None

    def __init__(self, config: SaeConfig, sizes: SaeSizes, ranks: Ranks) -> None:
        raise_all(self.problems(config, sizes))
        self.n_features = sizes.n_features
        self.schedule = KSchedule.of(config)

    @classmethod
    def problems(cls, config: SaeConfig, sizes: SaeSizes) -> list[str]:
        """Return the contradictions between settings that show once the sizes are decided.

        `SaeConfig.width_problems` has refused a k above n_features before.
        """
        return []

    def extra_parameters(self) -> dict[str, ExtraParameter]:
        """Return the parameters [F] that this method trains beyond encoder and decoder, by name.

        A sparsifier reads them by `sae.get_parameter(name)`.
        """
        return {}

    def before_step(self, sae: TrainableAutoencoder, *, halted: Tensor) -> None:  # noqa: B027 (most do nothing)
        """Change parameters before a step's pre-activations are computed.

        Args:
            sae: parameters that may be changed, without a graph.
            halted: scalar bool on the device. Where it is true nothing may change.
        """

    @abstractmethod
    def encode(self, sae: TrainableAutoencoder, inputs: StepInputs) -> Encoding:
        """Return the code of this rank's tokens and features, and the method's own loss.

        Args:
            sae: parameters that the gradients belong to.
            inputs: the step's tensors.
        """

    def after_step(  # noqa: B027 (most do nothing)
        self, sae: TrainableAutoencoder, *, info: StepInfo, firing: Firing, halted: Tensor
    ) -> None:
        """Change parameters after the optimizer's step.

        Args:
            sae: parameters that may be changed, without a graph.
            info: position of the step that ends.
            firing: counters of this rank's features, with the step that ends.
            halted: scalar bool on the device. Where it is true nothing may change.
        """

    def k_at(self, info: StepInfo) -> float | None:
        """Return the mean number of matches a token at a step; None where a coefficient takes the place of k."""
        return None if self.schedule is None else self.schedule.at(info)

    def figures(self, info: StepInfo) -> dict[str, float]:
        """Return the figures of this method for a row of metrics, of the next step. May wait for the device."""
        return {}

    def collapse_advice(self, info: StepInfo) -> str | None:
        """Return a continuation of "Lower optimizer.lr" for the message that no feature fires.

        None means that this is no error: the method may silence all features at this point of the run.
        """
        return ""

    def export(self, sae: TrainableAutoencoder, info: StepInfo) -> Export:
        """Return the rule of the exported autoencoder, as of the step that comes next."""
        return Export(k=self.k_at(info), W_enc=sae.W_enc, b_enc=sae.b_enc)

    def state(self) -> State:
        """Return the tensors that a resumed run must restore."""
        return State({}, {})

    def load_state(self, state: State) -> None:
        """Continue from a `state()` of these features."""
        assert state == State({}, {}), "a sparsifier with a state of its own loads it"
