"""Text without documents: a file that is cut into blocks at line ends. Each block may be held out."""

import mmap
from pathlib import Path

import torch

from sae_train.harvest.documents import Document, Documents, Flaw
from sae_train.harvest.text_files import read_bytes

BLOCK_BYTES = 64 * 1024
LEAST_BLOCK_BYTES = 256
BLOCKS_A_CORPUS = 128
"""Least number of blocks of a text; two of them are held out at least. A short text has smaller blocks."""
LONGEST_CHARACTER = 4
"""Most bytes of a character in UTF-8."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def block_bytes_of(total_bytes: int) -> int:
    """Return the least bytes of a block: 64 KiB, or less in a short text."""
    return max(LEAST_BLOCK_BYTES, min(BLOCK_BYTES, total_bytes // BLOCKS_A_CORPUS))


class TextBlocks(Documents):
    """A text file, cut at line ends about every `block_bytes`, and inside longer lines between two characters.

    `open_text` creates one for each file.
    """

    is_exact = True

    def __init__(self, path: Path, *, block_bytes: int) -> None:
        self._path = path
        self._bytes = read_bytes(path)
        self._ends = [len(_BYTE_ORDER_MARK) if self._bytes[:3] == _BYTE_ORDER_MARK else 0]
        while self._ends[-1] < len(self._bytes):
            self._ends.append(_block_end(self._bytes, self._ends[-1] + block_bytes, block_bytes))
        self.n_bytes = torch.tensor(self._ends, dtype=torch.int64).diff()

    def read(self, index: int) -> Document:
        data = bytes(self._bytes[self._ends[index] : self._ends[index + 1]])
        try:
            data.decode()
        except UnicodeDecodeError as error:
            place = self._ends[index] + error.start
            reason = f"{self._path}: byte {place} is not UTF-8. Convert the file"
            return Document(data, Flaw.REPAIRED, reason)
        return Document(data)

    def slice(self, index: int, start: int, stop: int) -> bytes:
        at = self._ends[index]
        return bytes(self._bytes[at + start : min(at + stop, self._ends[index + 1])])

    def ends_document(self, index: int) -> bool:
        return index == len(self) - 1


def _block_end(data: bytes | mmap.mmap, target: int, window: int) -> int:
    """Return the first line end at `target` or later, or the start of a character where none is near."""
    size = len(data)
    if target >= size:
        return size
    line_end = data.find(b"\n", target - 1, target + window)
    if line_end >= 0:
        return line_end + 1
    return character_start(data, target, size)


def character_start(data: bytes | mmap.mmap, target: int, size: int) -> int:
    """Return the first byte at `target` or later that begins a character of UTF-8, or `size` where none does."""
    for place in range(target, min(target + LONGEST_CHARACTER, size)):
        if data[place] & 0xC0 != 0x80:
            return place
    return min(target + LONGEST_CHARACTER, size)
