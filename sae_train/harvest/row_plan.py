"""Which rows of ready-made activations are trained on and which are held out, decided from the files' headers."""

from dataclasses import dataclass

from sae_train.config import TensorsHarvestConfig
from sae_train.config.harvest import HELD_OUT_BLOCK
from sae_train.config.source import SourceConfig
from sae_train.errors import DataError
from sae_train.harvest.stream import whole_batches
from sae_train.harvest.tensor_files import FileFacts, read_headers

HELD_OUT_SHARE = 0.05
MOST_HELD_OUT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """The use of each row. `check_stream` makes it, and `TensorStream` opens the files that it names."""

    files: list[FileFacts]
    """Files of harvest.path, with their headers."""
    held_out_files: list[FileFacts] | None
    """Files of harvest.held_out. None where the last rows of `files` are held out."""
    n_training: int
    """Rows 0..n_training-1 of `files` are trained on. Without `held_out_files` the rows after them are held out."""

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.files[0].d_model


def plan_rows(source: SourceConfig) -> RowPlan:
    """Return the use of each row.

    Raises:
        DataError: unusable files, too few rows to hold any out, or fewer than `tokens` with data.repeat=false.
    """
    harvest = source.tensors
    files = read_headers(harvest.path, key="harvest.path", gradients=source.reads_gradients)
    n_rows, held_out_files = sum(file.n_rows for file in files), None
    if harvest.held_out is None:
        n_held_out = min(int(HELD_OUT_SHARE * n_rows), MOST_HELD_OUT)
        n_training = n_rows - n_held_out
        if n_held_out <= HELD_OUT_BLOCK:
            least = int((HELD_OUT_BLOCK + 1) / HELD_OUT_SHARE)
            raise DataError(f"harvest.path={harvest.path}: {n_rows} rows; the last 5% are held out, and must be more "
                            f"than {HELD_OUT_BLOCK}. Give at least {least} rows, or harvest.held_out=DIR.")  # fmt: skip
    else:
        held_out_files = read_headers(harvest.held_out, key="harvest.held_out")
        n_training = n_rows
        _check_held_out(harvest, files, held_out_files)
    if not source.data.repeat and whole_batches(source) > n_training:
        raise DataError(f"data.repeat=false: harvest.path={harvest.path} holds {n_training} rows to train on, and "
                        f"tokens={source.tokens} is {whole_batches(source)} in whole batches. Lower tokens, or set "
                        "data.repeat=true.")  # fmt: skip
    return RowPlan(files=files, held_out_files=held_out_files, n_training=n_training)


def _check_held_out(harvest: TensorsHarvestConfig, files: list[FileFacts], held_out: list[FileFacts]) -> None:
    """Refuse held-out files of another width than the training files, or with too few rows."""
    d_model, width, n_held_out = files[0].d_model, held_out[0].d_model, sum(file.n_rows for file in held_out)
    if width != d_model:
        raise DataError(f"harvest.held_out={harvest.held_out}: {width} columns, but harvest.path has {d_model}. "
                        "Both must come from one site.")  # fmt: skip
    if n_held_out <= HELD_OUT_BLOCK:
        raise DataError(f"harvest.held_out={harvest.held_out}: {n_held_out} rows. Give more than {HELD_OUT_BLOCK}: "
                        "one half sets thresholds while the other is evaluated.")  # fmt: skip
