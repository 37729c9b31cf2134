"""The corpus: documents by index, and which of them are held out.

Hub datasets and parquet files are read through `datasets` (mapped, random access); local text and JSON lines
directly. The only file that imports `datasets`.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_train.assets import held_out_corpus, training_corpus
from sae_train.config import DataConfig
from sae_train.errors import DataError, suggest
from sae_train.harvest.hub import hub_error, local_path
from sae_train.harvest.text_files import Documents, Joined, JsonLines, Pieces, piece_bytes_of

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
HELD_OUT_SHARE = 0.02
FINGERPRINTED = 16
"""Documents, spread evenly, whose hashes tell one corpus from another."""
_HASH_RANGE = 2**64


class Corpus:
    """Training documents by index, some of which may be held out by a hash of their text.

    Indices count all documents; a lane skips the held-out ones as it meets them.
    """

    def __init__(self, data: DataConfig, *, lanes: int) -> None:
        self._data, self._lanes = data, lanes
        self._documents, self._held_out = _open(data, lanes=lanes)
        if not len(self._documents):
            raise DataError(f"data.id={data.id}: holds no text.")
        self._below = 0 if self._held_out is not None else self._held_out_bound()

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        return self._documents[index]

    def holds_out(self, text: str) -> bool:
        """Return whether this text is kept out of training."""
        return self._below > 0 and _hash(text) < self._below

    def held_out_texts(self) -> Iterator[str]:
        """Yield the held-out documents in order."""
        if self._held_out is not None:
            return (self._held_out[index] for index in range(len(self._held_out)))
        return (text for text in self._texts() if self.holds_out(text))

    def recut(self, lanes: int) -> "Corpus":
        """Return the corpus as another number of lanes would see it: text without documents is cut anew."""
        return Corpus(self._data, lanes=lanes)

    def fingerprint(self) -> list[int]:
        """Return numbers that change when the corpus does: how many documents, and hashes of a few of them."""
        last = len(self) - 1
        few = sorted({number * last // FINGERPRINTED for number in range(FINGERPRINTED + 1)})
        return [len(self), *(_hash(self[index]) >> 1 for index in few)]

    def _texts(self) -> Iterator[str]:
        return (self._documents[index] for index in range(len(self._documents)))

    def _held_out_bound(self) -> int:
        """Return below which hash a text is held out: 2% of all hashes, or what holds out two documents."""
        below = int(HELD_OUT_SHARE * _HASH_RANGE)
        smallest: list[int] = []
        for text in self._texts():
            smallest = sorted([*smallest, _hash(text)])[:2]
            if len(smallest) == 2 and smallest[1] < below:
                return below
        below = smallest[-1] + 1
        if all(_hash(text) < below for text in self._texts()):
            raise DataError(f"data.id={self._data.id}: {len(self)} documents leave none to train on once two are "
                            "held out. Give more, or held-out ones of their own as data.held_out_split.")  # fmt: skip
        return below


def check_data(data: DataConfig) -> None:
    """Refuse a hub dataset, configuration or column that does not exist, without fetching the data."""
    if not is_local(data):
        import datasets

        try:
            builder = datasets.load_dataset_builder(data.id, data.subset)
        except (OSError, ValueError) as error:
            raise _hub_data_error(data, error) from error
        if builder.info.features:
            _check_column(data, list(builder.info.features))


def is_local(data: DataConfig) -> bool:
    """Return whether the corpus is bundled or lies in local files."""
    return data.id == "bundled" or _local_path(data.id) is not None


def _open(data: DataConfig, *, lanes: int) -> tuple[Documents, Documents | None]:
    """Return training documents and, where they have a split of their own, held-out ones."""
    if data.id == "bundled":
        return (JsonLines(training_corpus(), column=data.text_column),
                JsonLines(held_out_corpus(), column=data.text_column))  # fmt: skip
    path = _local_path(data.id)
    if path is None:
        held_out = _open_hub(data, data.held_out_split) if data.held_out_split else None
        return _open_hub(data, data.split), held_out
    files = _files(path, key="data.id")
    if data.held_out_split is None:
        return _open_files(files, data, lanes=lanes), None
    held = _files(Path(data.held_out_split).expanduser(), key="data.held_out_split")
    apart = [file for file in files if file.resolve() not in {other.resolve() for other in held}]
    return _open_files(apart, data, lanes=lanes), _open_files(held, data, lanes=lanes)


def _local_path(name: str) -> Path | None:
    return Path(name).expanduser() if name.endswith(SUFFIXES) else local_path(name)


def _files(path: Path, *, key: str) -> list[Path]:
    """Return the text files that `path` is or holds, in sorted order."""
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        if not files:
            raise DataError(f"{key}={path}: no text files in this directory. Known kinds: {kinds}.")
        return files
    if not path.exists():
        near = suggest(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"{key}={path}: no such file or directory." + (near if "Did you mean" in near else ""))
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{key}={path}: not a kind of file that is read. Known kinds: {kinds}.")
    return [path]


def _open_files(files: list[Path], data: DataConfig, *, lanes: int) -> Documents:
    text_bytes = sum(file.stat().st_size for file in files if file.suffix == ".txt")
    piece_bytes = piece_bytes_of(text_bytes, lanes=lanes)
    parts: list[Documents] = []
    for file in files:
        if file.suffix == ".txt":
            parts.append(Pieces(file, piece_bytes=piece_bytes))
        elif file.suffix == ".parquet":
            parts.append(_open_parquet(file, data))
        else:
            parts.append(JsonLines(file, column=data.text_column))
    return Joined(parts)


class _Rows(Documents):
    """One column of a map-style dataset."""

    def __init__(self, rows: Any, data: DataConfig) -> None:
        _check_column(data, rows.column_names)
        self._rows, self._data = rows.select_columns([data.text_column]), data

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        text = self._rows[index][self._data.text_column]
        if not isinstance(text, str):
            raise DataError(f"data.text_column={self._data.text_column}: row {index} of {self._data.id} "
                            f"holds {type(text).__name__} there, not text.")  # fmt: skip
        return text


def _open_parquet(file: Path, data: DataConfig) -> Documents:
    import datasets

    try:
        return _Rows(datasets.load_dataset("parquet", data_files=str(file), split="train"), data)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{file}: not a readable parquet file ({str(error).splitlines()[0][:160]}).") from error


def _open_hub(data: DataConfig, split: str) -> Documents:
    import datasets

    try:
        return _Rows(datasets.load_dataset(data.id, data.subset, split=split), data)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise _hub_data_error(data, error, split=split) from error


def _hub_data_error(data: DataConfig, error: Exception, *, split: str | None = None) -> DataError:
    first = str(error).splitlines()[0]
    if "Config name is missing" in str(error) or "BuilderConfig" in first:
        return DataError(f"data.subset={data.subset}: {data.id} needs one of its own configurations: "
                         f"{' '.join(str(error).split())[:300]}")  # fmt: skip
    if split is not None and "split" in first.lower():
        return DataError(f"data.split={split}: {data.id} has no such split: {first[:300]}")
    return hub_error("data.id", data.id, error)


def _check_column(data: DataConfig, columns: list[str]) -> None:
    if data.text_column not in columns:
        raise DataError(f"data.text_column={data.text_column}: {data.id} has no such column."
                        + suggest(data.text_column, columns))  # fmt: skip


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
