"""Activations in `*.safetensors` files, as one table of rows in sorted file order, mapped into memory.

The files come from anywhere, so everything about them is checked. Letters: N rows asked for, D d_model.
"""

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_train.errors import DataError, suggest

TENSOR = "activations"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SPAN_ELEMENTS = 8 * 1024 * 1024


class FileFacts(NamedTuple):
    path: Path
    n_rows: int
    d_model: int
    dtype: str


def read_headers(directory: str, *, key: str) -> list[FileFacts]:
    """Return what the headers of a directory's files say, in sorted order.

    Raises:
        DataError: no such directory, no files, or one that does not hold `activations` [n, d_model] in floats.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise DataError(f"{key}={directory}: no such directory. Give one that holds *.safetensors files with a tensor "
                        f"{TENSOR!r} [n, d_model].")  # fmt: skip
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise DataError(f"{key}={directory}: no *.safetensors files there.")
    facts = [_read_header(file) for file in files]
    first = facts[0]
    for other in facts[1:]:
        if other.d_model != first.d_model:
            raise DataError(f"{other.path}: {other.d_model} columns, but {first.path.name} has {first.d_model}. "
                            "All files must come from one site.")  # fmt: skip
    if not sum(fact.n_rows for fact in facts):
        raise DataError(f"{key}={directory}: its files hold no rows.")
    return facts


class TensorTable:
    """All rows of a directory's files, by index."""

    def __init__(self, directory: str, *, key: str, dtype: torch.dtype) -> None:
        """Args:
        directory: of the files.
        key: the setting that named it, for messages.
        dtype: rows are returned in.
        """
        self.files = read_headers(directory, key=key)
        self.d_model = self.files[0].d_model
        self.dtype = dtype
        self._tensors = [_map(fact.path) for fact in self.files]
        self._starts = torch.tensor([0, *(fact.n_rows for fact in self.files)]).cumsum(0)
        self.n_rows = int(self._starts[-1])

    def rows(self, index_N: Tensor) -> Tensor:
        """Return the rows [N, D] at int64 indices, in their order, on the CPU."""
        out_ND = torch.empty(len(index_N), self.d_model, dtype=self.dtype)
        order = index_N.argsort(stable=True)
        bounds = torch.searchsorted(index_N[order], self._starts).tolist()
        for file, (start, stop) in enumerate(pairwise(bounds)):
            if start < stop:
                place = order[start:stop]
                out_ND[place] = self._tensors[file][index_N[place] - self._starts[file]].to(self.dtype)
        return out_ND

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, rows [N, D]) over start..stop in order, in the files' own number format."""
        for file, fact in enumerate(self.files):
            offset = int(self._starts[file])
            low, high = max(start - offset, 0), min(stop - offset, fact.n_rows)
            size = max(1, _SPAN_ELEMENTS // self.d_model)
            for at in range(low, high, size):
                yield offset + at, self._tensors[file][at : min(at + size, high)]

    def place(self, row: int) -> str:
        """Return 'file, row n' for a row of the table, for messages."""
        file = int(torch.searchsorted(self._starts, row, right=True)) - 1
        return f"{self.files[file].path}, row {row - int(self._starts[file])}"

    def fingerprint(self) -> list[int]:
        """Return numbers that change when files come, go or change size, or one of a few of their rows does."""
        numbers = [self.n_rows, self.d_model]
        for fact, tensor in zip(self.files, self._tensors, strict=True):
            few = tensor[[0, fact.n_rows // 3, fact.n_rows // 2, -1]] if fact.n_rows else tensor
            digest = hashlib.sha256(few.contiguous().view(torch.uint8).numpy().tobytes()).digest()
            numbers += [fact.n_rows, int.from_bytes(digest[:8], "big") >> 1]
        return numbers


def _read_header(path: Path) -> FileFacts:
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            if TENSOR not in names:
                raise DataError(f"{path}: no tensor {TENSOR!r} in it." + suggest(TENSOR, names)
                                + " Save the activations under that name.")  # fmt: skip
            view = file.get_slice(TENSOR)
            shape, dtype = view.get_shape(), view.get_dtype()
    except SafetensorError as error:
        raise DataError(f"{path}: not a complete safetensors file ({error}). Write it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if dtype not in _DTYPES:
        raise DataError(f"{path}: {TENSOR!r} is of type {dtype}. Save floats: {', '.join(_DTYPES.values())}.")
    if len(shape) != 2 or shape[1] == 0:
        raise DataError(f"{path}: {TENSOR!r} has shape {shape}, not [n, d_model].")
    return FileFacts(path, shape[0], shape[1], _DTYPES[dtype])


def _map(path: Path) -> Tensor:
    with safe_open(str(path), framework="pt") as file:
        tensor: Tensor = file.get_tensor(TENSOR)  # mapped: pages are read when rows are
    return tensor
