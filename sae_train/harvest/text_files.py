"""Documents in local files: JSON lines, plain or compressed, and text without documents, cut into pieces.

Uncompressed files are mapped into memory and read where needed; compressed ones are unpacked into memory.
"""

import gzip
import json
import lzma
import mmap
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from sae_train.errors import DataError, suggest

PIECE_BYTES = 64 * 1024
"""Text without documents is cut at line ends this far apart, or finer where it is short for its lanes."""
PIECES_A_LANE = 4
_PARSED_AT_ONCE = 256 * 1024 * 1024
"""JSON lines up to this size are all parsed when opened, so that a bad line is found before training."""


class Documents(ABC):
    """Texts by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> str: ...


class Joined(Documents):
    """Several sources one after the other."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = list(parts)
        self._ends: list[int] = []
        for part in self._parts:
            self._ends.append(len(part) + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class JsonLines(Documents):
    """One JSON object a line, its text under `column`; empty lines are skipped."""

    def __init__(self, path: Path, *, column: str) -> None:
        self._path, self._column = path, column
        self._bytes = read_bytes(path)
        self._spans: list[tuple[int, int, int]] = []
        start = 0
        number = 0
        while start < len(self._bytes):
            end = self._bytes.find(b"\n", start)
            end = len(self._bytes) if end < 0 else end
            number += 1
            if self._bytes[start:end].strip():
                self._spans.append((start, end, number))
            start = end + 1
        checked = len(self._spans) if len(self._bytes) <= _PARSED_AT_ONCE else min(1, len(self._spans))
        for index in range(checked):
            self[index]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        start, end, number = self._spans[index]
        try:
            row = json.loads(self._bytes[start:end])
        except ValueError as error:
            raise DataError(f"{self._path}, line {number}: not JSON ({error}). Repair or remove the line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{self._path}, line {number}: not a JSON object. Each line is like "
                            f'{{"{self._column}": "..."}}.')  # fmt: skip
        if self._column not in row:
            raise DataError(f"data.text_column={self._column}: {self._path}, line {number} has no such key."
                            + suggest(self._column, row))  # fmt: skip
        text = row[self._column]
        if not isinstance(text, str):
            raise DataError(f"data.text_column={self._column}: {self._path}, line {number} holds "
                            f"{type(text).__name__} there, not text.")  # fmt: skip
        return text


class Pieces(Documents):
    """A text file cut at line ends about every `piece_bytes`; where a line is longer, between two characters."""

    def __init__(self, path: Path, *, piece_bytes: int) -> None:
        self._path = path
        self._bytes = read_bytes(path)
        self._ends: list[int] = []
        start = 0
        while start < len(self._bytes):
            start = self._cut(start + piece_bytes, piece_bytes)
            self._ends.append(start)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        try:
            return self._bytes[start : self._ends[index]].decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: byte {start + error.start} is not UTF-8. Convert the file.") from error

    def _cut(self, target: int, piece_bytes: int) -> int:
        """Return the first line end at or after `target`, or a character's start where none is near."""
        size = len(self._bytes)
        if target >= size:
            return size
        line_end = self._bytes.find(b"\n", target - 1, target + piece_bytes)
        if line_end >= 0:
            return line_end + 1
        while target < size and self._bytes[target] & 0xC0 == 0x80:
            target += 1
        return target


def piece_bytes_of(total_bytes: int, *, lanes: int) -> int:
    """Return how long pieces are: 64 KiB, or less where that gave a lane fewer than four of them."""
    return max(1, min(PIECE_BYTES, total_bytes // (PIECES_A_LANE * lanes)))


def read_bytes(path: Path) -> bytes | mmap.mmap:
    """Return a file's bytes, unpacked; uncompressed files are mapped rather than read."""
    try:
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes())
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.stat().st_size == 0:
            return b""
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}). Fetch or compress it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
