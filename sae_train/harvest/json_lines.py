"""JSON lines: one object a line, its text under one key.

Lines are found once and parsed when they are read. A long line is parsed once, and its text is kept in a temporary file
without a name. Parsing it again for every piece would cost more than the piece.
"""

import json
import mmap
import os
import re
import tempfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from sae_train.errors import DataError, suggest
from sae_train.harvest.documents import Document, Documents, Flaw
from sae_train.harvest.text_files import read_bytes
from sae_train.phases import SILENT, Phases

LONG_LINE = 64 * 1024
"""Bytes of a line from which on its text is kept after parsing."""
_SEARCHED_AT_ONCE = 64 * 1024 * 1024
_BLANK_AT_MOST = 8
"""Bytes of a line up to which it may be skipped as blank. A longer blank line counts as an empty document."""
Int64s = NDArray[np.int64]
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def open_json_lines(path: Path, *, column: str, is_scanned: bool, phases: Phases = SILENT) -> Documents:
    """Return the documents of a file of JSON lines.

    Args:
        path: the file.
        column: key of the text.
        is_scanned: parse every line now and keep the texts in memory; else parse lines when they are read.
        phases: shows how many bytes were searched for lines.
    """
    lines = JsonLines(path, column=column, phases=phases)
    return TextsInMemory([lines.read(index) for index in range(len(lines))]) if is_scanned else lines


class TextsInMemory(Documents):
    """Documents that `open_json_lines` has read, in one block of bytes."""

    is_exact = True

    def __init__(self, documents: list[Document]) -> None:
        self._data = b"".join(document.data for document in documents)
        self.n_bytes = torch.tensor([len(document.data) for document in documents], dtype=torch.int64)
        self._ends = self.n_bytes.cumsum(0).tolist()
        self._flawed = {n: document._replace(data=b"") for n, document in enumerate(documents) if document.flaw}

    def read(self, index: int) -> Document:
        data = self.slice(index, 0, self.size(index))
        return self._flawed[index]._replace(data=data) if index in self._flawed else Document(data)

    def slice(self, index: int, start: int, stop: int) -> bytes:
        end = self._ends[index]
        at = end - self.size(index)
        return self._data[at + start : min(at + stop, end)]


class JsonLines(Documents):
    """One JSON object a line, with its text under `column`. Blank lines are no documents.

    `open_json_lines` creates it. `n_bytes` are the lengths of the lines, which bound the lengths of their texts.
    """

    is_exact = False

    def __init__(self, path: Path, *, column: str, phases: Phases = SILENT) -> None:
        self._path, self._column = path, column
        self._bytes = read_bytes(path)
        self._start, self._stop, self._number = _find_lines(self._bytes, phases)
        self.n_bytes = torch.from_numpy(self._stop - self._start)
        self._long: dict[int, tuple[int, int]] = {}
        self._spool: IO[bytes] | None = None
        self._last: tuple[int, bytes] = (-1, b"")

    def read(self, index: int) -> Document:
        return self._parsed(index, self._bytes[int(self._start[index]) : int(self._stop[index])])

    def slice(self, index: int, start: int, stop: int) -> bytes:
        if self._is_long(index):
            assert self._spool is not None
            at, length = self._long[index]
            return os.pread(self._spool.fileno(), max(0, min(stop, length) - start), at + start)
        return self._text(index)[start:stop]

    def size(self, index: int) -> int:
        return self._long[index][1] if self._is_long(index) else len(self._text(index))

    def _is_long(self, index: int) -> bool:
        """Return whether the line is long. The text of a long line is kept from the first call on."""
        if int(self._stop[index] - self._start[index]) < LONG_LINE:
            return False
        if index not in self._long:
            text = self.read(index).data
            try:
                self._spool = self._spool or tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this object)
                self._long[index] = self._spool.seek(0, os.SEEK_END), len(text)
                self._spool.write(text)
                self._spool.flush()
            except OSError as error:
                raise DataError(f"{tempfile.gettempdir()}: cannot keep the text of the long line {self._number[index]} "
                                f"of {self._path} ({error.strerror}). Free space there, or set TMPDIR to another "
                                "directory.") from error  # fmt: skip
        return True

    def _text(self, index: int) -> bytes:
        """Return the text of a short line. The last one is cached, because it is read several times in a row."""
        if self._last[0] != index:
            self._last = index, self.read(index).data
        return self._last[1]

    def _parsed(self, index: int, line: bytes) -> Document:
        where = f"{self._path}, line {self._number[index]}"
        flaw, reason = Flaw.NONE, ""
        try:
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                flaw, reason = Flaw.REPAIRED, f"{where}: byte {error.start} of the line is not UTF-8"
                row = json.loads(line.decode(errors="replace"))
        except (ValueError, RecursionError) as error:
            if not line.strip():
                return Document(b"", Flaw.EMPTY, f"{where}: blank")
            return Document(b"", Flaw.UNUSABLE, f"{where}: not JSON ({error}). Repair or remove the line.")
        if not isinstance(row, dict):
            return Document(b"", Flaw.UNUSABLE, f"{where}: not a JSON object. Each line is like "
                                                f'{{"{self._column}": "..."}}.')  # fmt: skip
        if self._column not in row:
            return Document(b"", Flaw.UNUSABLE, f"data.text_column={self._column}: {where} has no such key."
                                                + suggest(self._column, row))  # fmt: skip
        text = row[self._column]
        if text is None or text == "":
            return Document(b"", Flaw.EMPTY, f"{where}: {self._column!r} is {'null' if text is None else 'empty'}")
        if not isinstance(text, str):
            return Document(b"", Flaw.UNUSABLE, f"data.text_column={self._column}: {where} holds "
                                                f"{type(text).__name__} there, not text.")  # fmt: skip
        try:
            return Document(text.encode(), flaw, reason)
        except UnicodeEncodeError:
            repaired = _LONE_SURROGATE.sub("\ufffd", text).encode()
            return Document(repaired, Flaw.REPAIRED, f"{where}: {self._column!r} holds half of a surrogate pair")


def _find_lines(data: bytes | mmap.mmap, phases: Phases) -> tuple[Int64s, Int64s, Int64s]:
    """Return start, stop and number (from 1) of all lines that are not blank, int64."""
    size = len(data)
    ends = [np.empty(0, dtype=np.int64)]
    for at in range(0, size, _SEARCHED_AT_ONCE):
        piece = np.frombuffer(data[at : at + _SEARCHED_AT_ONCE], dtype=np.uint8)
        ends.append(np.flatnonzero(piece == ord("\n")) + at)
        phases.advance(len(piece))
    stop = np.concatenate([*ends, [size]]).astype(np.int64)
    start = np.concatenate([[0], stop[:-1] + 1]).astype(np.int64)
    is_text = stop > start
    for line in np.flatnonzero(is_text & (stop - start <= _BLANK_AT_MOST)):
        is_text[line] = bool(data[int(start[line]) : int(stop[line])].strip())
    return start[is_text], stop[is_text], np.flatnonzero(is_text) + 1
