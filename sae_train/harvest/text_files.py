"""Text files: the files that a path names, and their bytes."""

import gzip
import lzma
import mmap
import zlib
from pathlib import Path

from sae_train.errors import DataError, suggest

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
_WIDE = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
"""First bytes of files that are not in UTF-8, the longer marks first."""


def text_files(path: Path, *, key: str) -> list[Path]:
    """Return `path` itself, or the text files of a directory in sorted order, without hidden ones.

    Args:
        path: a file or a directory.
        key: the setting that named it, for messages.

    Raises:
        DataError: there are none, or the file has a suffix that is not read.
    """
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        files = sorted(file for file in found if not _is_hidden(file.relative_to(path)))
        if not files:
            raise DataError(f"{key}={path}: no text files in this directory. Known kinds: {kinds}.")
        return files
    if path.is_symlink() and not path.exists():
        raise DataError(f"{key}={path}: a link to what is not there ({path.readlink()}).")
    if not path.exists():
        near = suggest(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"{key}={path}: no such file or directory." + (near if "Did you mean" in near else ""))
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{key}={path}: not a kind of file that is read. Known kinds: {kinds}.")
    return [path]


def _is_hidden(path: Path) -> bool:
    """Return whether a part of a path begins with a dot: `.ipynb_checkpoints`, macOS's `._a.jsonl`."""
    return any(part.startswith(".") for part in path.parts)


def read_bytes(path: Path) -> bytes | mmap.mmap:
    """Return a file's bytes, unpacked and in UTF-8. Uncompressed files in UTF-8 are mapped, not read.

    Raises:
        DataError: it cannot be read or unpacked.
    """
    try:
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes())
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.stat().st_size == 0:
            return b""
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        encoding = next((name for mark, name in _WIDE.items() if data[: len(mark)] == mark), None)
        return data if encoding is None else data[:].decode(encoding, errors="replace").encode()
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}). Fetch or compress it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
