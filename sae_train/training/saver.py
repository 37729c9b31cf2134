"""When a run's checkpoints are written and named: in the step, or beside it."""

from pathlib import Path
from typing import Any

from sae_train.config import CheckpointConfig
from sae_train.errors import UserError
from sae_train.phases import SILENT, Phases
from sae_train.ranks.interface import Ranks
from sae_train.training import checkpoint
from sae_train.training.console import warn
from sae_train.training.trainer import Trainer


class Saver:
    """Begins checkpoints and publishes them. All ranks call its methods at the same places.

    Attributes:
        saved_at: step of the newest published checkpoint, -1 before there is one.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, ranks: Ranks, phases: Phases = SILENT) -> None:
        self.saved_at = -1
        self._directory, self._config, self._ranks, self._phases = directory, config, ranks, phases
        self._saving: checkpoint.Saving | None = None

    def save(self, trainer: Trainer, notes: dict[str, Any], *, is_waited_for: bool = False) -> None:
        """Write a checkpoint, or begin one beside the step.

        Args:
            trainer: its state is saved as it is now.
            notes: see `checkpoint.begin`.
            is_waited_for: nothing goes on beside which it could be written; so it is after the last step.
        """
        self.publish()
        beside = self._config.beside
        beside = self._ranks.device.type == "cuda" if beside is None else beside
        beside = beside and not is_waited_for and trainer.n_done < trainer.plan.steps
        self._saving = checkpoint.begin(
            self._directory,
            notes=notes,
            replicated=trainer.state(),
            features=trainer.features,
            feature_state=trainer.feature_state(),
            lane_states=trainer.stream.lane_states(),
            ranks=self._ranks,
            keep=self._config.keep,
            beside=beside,
            phases=self._phases,
        )
        if not beside:
            self.publish()

    def publish(self) -> None:
        """Have the checkpoint that is being written, if there is one, on disk and named."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.publish()
        except KeyboardInterrupt:
            self._saving = saving  # `publish_at_last` waits for it once more
            raise
        self.saved_at = saving.step

    def publish_if_written(self) -> None:
        """Do the same where nothing has to be waited for."""
        if self._saving is not None and self._saving.is_written():
            self.publish()

    def publish_at_last(self) -> None:
        """Do the same while something else is raised, and only say why it fails, if the disk or memory is to blame."""
        try:
            self.publish()
        except (UserError, MemoryError) as error:
            warn(f"the checkpoint that was being written is lost: {error}")
