"""Rows of datasets: from the hub, from parquet files, from directories that `datasets` saved.

This is the only file that imports `datasets`, which maps tables into memory. A row's bytes are read from that mapping.
"""

import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import torch

from sae_train.config import DataConfig
from sae_train.errors import DataError, suggest
from sae_train.harvest.documents import Document, Documents, Flaw
from sae_train.harvest.json_lines import TextsInMemory
from sae_train.hub import hub_error
from sae_train.phases import Phases

_ROWS_AT_ONCE = 65_536
_TEXT = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view, pyarrow.types.is_null)
_SAVED = ("dataset_info.json", "state.json")
_SAVED_SPLITS = "dataset_dict.json"


class DatasetRows(Documents):
    """One column of a map-style dataset, as documents. The functions below open it."""

    is_exact = True

    def __init__(self, rows: Any, data: DataConfig, *, source: str, phases: Phases) -> None:
        """Args:
        rows: the dataset.
        data: names the column.
        source: file or hub id, for messages.
        phases: shows how many rows were measured.

        Raises:
            DataError: there is no such column, or it holds no text.
        """
        check_column(data, rows.column_names, source=source)
        self._column, self._source = data.text_column, source
        self._rows = rows.select_columns([data.text_column]).with_format("arrow")
        kind = self._rows.features.arrow_schema.field(data.text_column).type
        check_text(data, kind, source=source)
        lengths = [torch.empty(0, dtype=torch.int64)]
        with phases.of("measuring text", total=len(self._rows), unit="row"):
            for batch in self._rows.iter(batch_size=_ROWS_AT_ONCE):
                length = pyarrow.compute.binary_length(batch[data.text_column].cast(pyarrow.large_string()))
                lengths.append(torch.from_numpy(length.fill_null(0).to_numpy().astype("int64")))
                phases.advance(len(batch))
        self.n_bytes = torch.cat(lengths)

    def read(self, index: int) -> Document:
        data = self._buffer(index)
        if not len(data):
            return Document(b"", Flaw.EMPTY, f"{self._source}, row {index}: {self._column!r} is null or empty")
        text = bytes(data)
        try:
            text.decode()
        except UnicodeDecodeError as error:
            reason = f"{self._source}, row {index}: byte {error.start} of {self._column!r} is not UTF-8"
            return Document(text, Flaw.REPAIRED, reason)
        return Document(text)

    def slice(self, index: int, start: int, stop: int) -> bytes:
        return bytes(self._buffer(index)[start:stop])

    def _buffer(self, index: int) -> memoryview:
        """Return a view of the bytes of one row."""
        scalar = self._rows[index : index + 1][self._column][0]
        return memoryview(scalar.as_buffer()) if scalar.is_valid else memoryview(b"")


def open_parquet(file: Path, data: DataConfig, phases: Phases) -> Documents:
    """Return the rows of a parquet file. Only the column with the text is read.

    Raises:
        DataError: the file is not readable, or the cache into which `datasets` unpacks it is not writable.
    """
    import datasets
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            schema, n_rows = opened.schema_arrow, opened.metadata.num_rows
        check_column(data, schema.names, source=str(file))
        check_text(data, schema.field(data.text_column).type, source=str(file))
        if not n_rows:
            return TextsInMemory([])
        column = data.text_column
        rows = datasets.load_dataset(
            "parquet",
            data_files=str(file),
            split="train",
            columns=[column],
            features=datasets.Features({column: datasets.Value("large_string")}),  # else it looks at all columns
        )
        return DatasetRows(rows, data, source=str(file), phases=phases)
    except (OSError, ValueError, KeyError, pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        _refuse_cache(error)
        raise DataError(f"{file}: not a readable parquet file ({str(error).splitlines()[0][:160]}).") from error


def is_saved(path: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote this directory."""
    return (path / _SAVED_SPLITS).is_file() or all((path / name).is_file() for name in _SAVED)


def open_saved(path: Path, data: DataConfig, split: str, phases: Phases) -> DatasetRows:
    """Return the rows of one split of a directory that `datasets.save_to_disk` wrote.

    Raises:
        DataError: the directory is not readable, or has no such split.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"data.id={path}: `datasets` saved this directory and cannot load it again "
                        f"({str(error).splitlines()[0][:160]}). Save it again.") from error  # fmt: skip
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"data.split={split}: {path} has no such split.{suggest(split, saved)} Choose it with "
                            "data=huggingface data.split=NAME.")  # fmt: skip
        saved = saved[split]
    return DatasetRows(saved, data, source=str(path), phases=phases)


def saved_splits(path: Path) -> list[str]:
    """Return the names of the splits of a saved directory, or an empty list where it holds a single dataset."""
    import datasets

    return list(datasets.load_from_disk(str(path))) if (path / _SAVED_SPLITS).is_file() else []


def open_hub(data: DataConfig, split: str, phases: Phases) -> DatasetRows:
    """Return the rows of one split of a hub dataset.

    Raises:
        DataError: the dataset cannot be loaded.
    """
    import datasets

    try:
        rows = datasets.load_dataset(data.id, data.subset, split=split)
        documents = DatasetRows(rows, data, source=data.id, phases=phases)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        _refuse_cache(error)
        raise _hub_data_error(data, error, split=split) from error
    documents.revision = _commit_of(rows)
    return documents


def _commit_of(rows: Any) -> str | None:
    """Return the commit of a dataset from the Hub, which names its directory in the cache. None where none does."""
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    return next((name for name in folders if re.fullmatch(r"[0-9a-f]{40}", name)), None)


def check_hub(data: DataConfig) -> None:
    """Refuse a hub dataset, configuration or column that does not exist, without fetching the data.

    Raises:
        DataError: names the setting to correct.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(data.id, data.subset)
    except (OSError, ValueError) as error:
        _refuse_cache(error)
        raise _hub_data_error(data, error) from error
    if builder.info.features:
        check_column(data, list(builder.info.features), source=data.id)


def check_column(data: DataConfig, columns: list[str], *, source: str) -> None:
    """Refuse a text column that is not among `columns`.

    Raises:
        DataError: suggests a column.
    """
    if data.text_column not in columns:
        raise DataError(f"data.text_column={data.text_column}: {source} has no such column."
                        + suggest(data.text_column, columns))  # fmt: skip


def check_text(data: DataConfig, kind: pyarrow.DataType, *, source: str) -> None:
    """Refuse a column that does not hold text.

    Raises:
        DataError: names the column's type.
    """
    while isinstance(kind, pyarrow.DictionaryType):
        kind = kind.value_type
    if not any(is_text(kind) for is_text in _TEXT):
        raise DataError(f"data.text_column={data.text_column}: {source} holds {kind} there, not text.")


def _refuse_cache(error: BaseException) -> None:
    """Raise a DataError that names the cache, if `error` comes from a failure to write it."""
    import datasets

    cause: BaseException | None = error
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    while cause is not None:
        if isinstance(cause, OSError) and cause.filename and _below(Path(os.fsdecode(cause.filename)), cache):
            raise DataError(f"{cause.filename}: cannot be written ({cause.strerror}). `datasets` unpacks tables into "
                            f"its cache there. Set HF_HOME to a directory that can be written.") from error  # fmt: skip
        cause = cause.__cause__ or cause.__context__


def _below(path: Path, cache: Path) -> bool:
    """Return whether `path` lies in the cache, or is one of its parent directories."""
    return cache in path.parents or path == cache or path in cache.parents


def _hub_data_error(data: DataConfig, error: Exception, *, split: str | None = None) -> DataError:
    first = str(error).splitlines()[0]
    if "Config name is missing" in str(error) or "BuilderConfig" in first:
        return DataError(f"data.subset={data.subset}: {data.id} needs one of its own configurations: "
                         f"{' '.join(str(error).split())[:300]}")  # fmt: skip
    if split is not None and "split" in first.lower():
        return DataError(f"data.split={split}: {data.id} has no such split: {first[:300]}")
    return hub_error("data.id", data.id, error)
