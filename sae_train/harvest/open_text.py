"""From `data.*` to documents: opens files, a dataset or a saved directory, and held-out text of its own if there is."""

from pathlib import Path

from sae_train.assets import held_out_corpus, training_corpus
from sae_train.config import DataConfig
from sae_train.errors import DataError, suggest
from sae_train.harvest.dataset_rows import check_hub, is_saved, open_hub, open_parquet, open_saved, saved_splits
from sae_train.harvest.documents import SCANNED_BYTES, Documents, Joined
from sae_train.harvest.json_lines import open_json_lines
from sae_train.harvest.plain_text import TextBlocks, block_bytes_of
from sae_train.harvest.text_files import SUFFIXES, text_files
from sae_train.hub import local_path
from sae_train.phases import SILENT, Phases

UNPACKED = 5
"""Usual ratio of the size of a text to its compressed size."""


def check_data(data: DataConfig) -> None:
    """Refuse a hub dataset, configuration or column that does not exist, without fetching the data."""
    if not is_local(data):
        check_hub(data)


def is_local(data: DataConfig) -> bool:
    """Return whether the corpus is bundled or lies in local files."""
    return data.id == "bundled" or _local_path(data.id) is not None


def open_text(data: DataConfig, phases: Phases = SILENT) -> tuple[Documents, Documents | None]:
    """Return the training documents, and the held-out ones where they have a split or files of their own."""
    if data.id == "bundled":
        return (open_json_lines(training_corpus(), column=data.text_column, is_scanned=True),
                open_json_lines(held_out_corpus(), column=data.text_column, is_scanned=True))  # fmt: skip
    path = _local_path(data.id)
    if data.held_out_split is not None and _is_trained_on(data, path):
        raise DataError(f"data.held_out_split={data.held_out_split}: this is what is trained on. Name other text, or "
                        "leave it null: 2% of the documents are held out.")  # fmt: skip
    if path is None:
        held_out = open_hub(data, data.held_out_split, phases) if data.held_out_split else None
        return open_hub(data, data.split, phases), held_out
    if is_saved(path):
        training: Documents = open_saved(path, data, data.split, phases)
        return training, _open_held_out(data, phases, splits=saved_splits(path), path=path)
    files = text_files(path, key="data.id")
    if data.held_out_split is None:
        return _open_files(files, data, phases), None
    held = Path(data.held_out_split).expanduser()
    if not is_saved(held):
        apart = {file.resolve() for file in text_files(held, key="data.held_out_split")}
        files = [file for file in files if file.resolve() not in apart]
        if not files:
            raise DataError(f"data.held_out_split={data.held_out_split}: holds every file of data.id={data.id}, so "
                            "nothing is left to train on. Name fewer files, or leave it null.")  # fmt: skip
    return _open_files(files, data, phases), _open_held_out(data, phases, splits=[], path=path)


def _is_trained_on(data: DataConfig, path: Path | None) -> bool:
    """Return whether data.held_out_split names the training text, in any spelling."""
    assert data.held_out_split is not None
    if (path is None or is_saved(path)) and data.held_out_split == data.split:
        return True
    if path is None:
        return False
    held = Path(data.held_out_split).expanduser().resolve()
    return held in (path.resolve(), (path / data.split).resolve() if is_saved(path) else path.resolve())


def _open_held_out(data: DataConfig, phases: Phases, *, splits: list[str], path: Path) -> Documents | None:
    """Return the held-out text: one of the `splits` of the saved directory `path`, or other files or directories."""
    name = data.held_out_split
    if name is None:
        return None
    if name in splits:
        return open_saved(path, data, name, phases)
    held = Path(name).expanduser()
    if splits and not held.exists():
        raise DataError(f"data.held_out_split={name}: {path} has no such split.{suggest(name, splits)}")
    if is_saved(held):
        return open_saved(held, data, data.split, phases)
    return _open_files(text_files(held, key="data.held_out_split"), data, phases)


def _local_path(name: str) -> Path | None:
    return Path(name).expanduser() if name.endswith(SUFFIXES) else local_path(name)


def _open_files(files: list[Path], data: DataConfig, phases: Phases) -> Documents:
    sizes = {file: file.stat().st_size for file in files}
    unpacked = sum(size * (UNPACKED if file.suffix in (".gz", ".xz") else 1) for file, size in sizes.items())
    is_scanned = unpacked <= SCANNED_BYTES
    block_bytes = block_bytes_of(sum(size for file, size in sizes.items() if file.suffix == ".txt"))
    parts: list[Documents] = []
    for number, file in enumerate(files, start=1):
        with phases.of(f"opening text, file {number} of {len(files)}", total=sizes[file], unit="B"):
            if file.suffix == ".txt":
                parts.append(TextBlocks(file, block_bytes=block_bytes))
            elif file.suffix == ".parquet":
                parts.append(open_parquet(file, data, phases))
            else:
                parts.append(open_json_lines(file, column=data.text_column, is_scanned=is_scanned, phases=phases))
    return Joined(parts)
