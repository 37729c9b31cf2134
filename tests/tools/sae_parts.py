"""Parts of a learner for tests that need no run: sizes, sparsifiers, a step's inputs."""

from torch import Tensor

from sae_train.config import RunConfig
from sae_train.ranks.interface import Ranks, Solo
from sae_train.sae.code import SparseCode
from sae_train.sae.firing import Firing
from sae_train.sae.sizes import SaeSizes
from sae_train.sae.step_info import StepInfo, StepInputs
from sae_train.sparsifiers import Sparsifier, build_sparsifier
from sae_train.sparsifiers.allocator import Allocator
from sae_train.sparsifiers.base import Encoding, Export
from sae_train.training.trainer import Trainer


def sizes_of(config: RunConfig, *, n_features: int, d_model: int = 16, dead_window: int = 10_000) -> SaeSizes:
    """Return the sizes of an SAE of a configuration."""
    return SaeSizes(
        d_model=d_model, n_features=n_features, batch_tokens=config.batch_tokens, dead_window=dead_window
    )  # fmt: skip


def sparsifier_of(config: RunConfig, *, n_features: int, ranks: Ranks | None = None) -> Sparsifier:
    """Return the sparsifier of a configuration."""
    return build_sparsifier(config.sae, sizes_of(config, n_features=n_features), ranks=ranks or Solo())


def selected(
    sparsifier: Sparsifier,
    pre_NF: Tensor,
    info: StepInfo,
    *,
    ranks: Ranks | None = None,
    firing: Firing | None = None,
    slope_NF: Tensor | None = None,
) -> SparseCode:
    """Return the matches that an allocator keeps of pre-activations."""
    assert isinstance(sparsifier, Allocator)
    firing = firing or Firing(pre_NF.shape[1], half_life_tokens=1000, device=pre_NF.device)
    x_ND = pre_NF.new_zeros(len(pre_NF), 1)  # no selection reads it
    inputs = StepInputs(
        x_ND=x_ND, pre_NF=pre_NF, slope_NF=slope_NF, info=info, firing=firing, ranks=ranks or Solo()
    )  # fmt: skip
    return sparsifier.select(inputs)


def inputs_of(trainer: Trainer, x_ND: Tensor) -> StepInputs:
    """Return the inputs of a trainer's next step for normalised activations."""
    learner = trainer.learners[0]
    return StepInputs(
        x_ND=x_ND,
        pre_NF=learner.dictionary.pre_activations(x_ND),
        info=learner.step_info(trainer.n_done),
        firing=learner.firing,
        ranks=trainer.ranks,
    )


def encoded(trainer: Trainer, x_ND: Tensor) -> Encoding:
    """Return the encoding of normalised activations by a trainer's sparsifier, without a step."""
    learner = trainer.learners[0]
    return learner.sparsifier.encode(learner.dictionary, inputs_of(trainer, x_ND))


def export_of(trainer: Trainer) -> Export:
    """Return the rule that a trainer's SAE would be exported by now."""
    learner = trainer.learners[0]
    return learner.sparsifier.export(learner.dictionary, learner.step_info(trainer.n_done))
