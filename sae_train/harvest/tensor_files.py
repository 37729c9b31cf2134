"""Activations in `*.safetensors` files, as one table of rows in sorted file order, mapped into memory.

The files come from anywhere, so everything about them is checked. Where gradients are read, each file holds a tensor of
gradients in addition to its activations. Letters: N rows, D d_model.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_train.errors import DataError, suggest
from sae_train.harvest.row_table import RowTable

TENSOR, GRADIENTS = "activations", "gradients"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SPAN_ELEMENTS = 8 * 1024 * 1024


class FileFacts(NamedTuple):
    """The header of one file, from `read_headers`."""

    path: Path
    n_rows: int
    d_model: int
    dtype: str


def read_headers(directory: str, *, key: str, gradients: bool = False) -> list[FileFacts]:
    """Return the headers of a directory's files, in sorted order.

    Args:
        directory: directory of the files.
        key: the setting that named it, for messages.
        gradients: whether each file must hold `gradients` of the shape of its `activations`.

    Raises:
        DataError: no such directory, no files, or a file without `activations` [n, d_model] in floats, or without the
            gradients.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise DataError(f"{key}={directory}: no such directory. Give one that holds *.safetensors files with a tensor "
                        f"{TENSOR!r} [n, d_model].")  # fmt: skip
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise DataError(f"{key}={directory}: no *.safetensors files there.")
    facts = [_read_header(file, TENSOR, _MISSING) for file in files]
    for fact in facts if gradients else ():
        _check_gradients(fact)
    first = facts[0]
    for other in facts[1:]:
        if other.d_model != first.d_model:
            raise DataError(f"{other.path}: {other.d_model} columns, but {first.path.name} has {first.d_model}. "
                            "All files must come from one site.")  # fmt: skip
    if not sum(fact.n_rows for fact in facts):
        raise DataError(f"{key}={directory}: its files hold no rows.")
    return facts


class TensorTable:
    """All rows of a directory's files, by index. `TensorStream` opens one for the files that `read_headers` found.

    Attributes:
        dtype: number format in which rows are returned.
        n_rows: rows of all files.
    """

    def __init__(self, files: Sequence[FileFacts], *, dtype: torch.dtype, gradients: bool = False) -> None:
        """Args:
        files: headers of the files.
        dtype: number format in which rows are returned.
        gradients: whether gradients are read.
        """
        self._files, self.dtype = files, dtype
        self._activations = [_map(file.path, TENSOR) for file in files]
        self._gradients = [_map(file.path, GRADIENTS) for file in files] if gradients else None
        self._activation_rows = RowTable(self._activations)
        self._gradient_rows = None if self._gradients is None else RowTable(self._gradients)
        self._starts = self._activation_rows.starts
        self.n_rows = int(self._starts[-1])

    def rows(self, index_N: Tensor) -> Tensor:
        """Return the activations [N, D] at int64 indices, in their order, on the CPU."""
        return self._activation_rows.rows(index_N, dtype=self.dtype)

    def gradient_rows(self, index_N: Tensor) -> Tensor | None:
        """Return the gradients [N, D] at int64 indices, in their order, on the CPU. None where none are read."""
        return None if self._gradient_rows is None else self._gradient_rows.rows(index_N, dtype=self.dtype)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yield (first row, activations [n, D], gradients [n, D] or None) over rows start..stop, in order.

        The tensors have the number format of their file.
        """
        for number, file in enumerate(self._files):
            offset = int(self._starts[number])
            low, high = max(start - offset, 0), min(stop - offset, file.n_rows)
            size = max(1, _SPAN_ELEMENTS // file.d_model)
            for at in range(low, high, size):
                part = slice(at, min(at + size, high))
                gradient_ND = None if self._gradients is None else self._gradients[number][part]
                yield offset + at, self._activations[number][part], gradient_ND

    def place(self, row: int) -> str:
        """Return 'file, row n' for a row of the table, for messages."""
        number = int(torch.searchsorted(self._starts, row, right=True)) - 1
        return f"{self._files[number].path}, row {row - int(self._starts[number])}"

    def fingerprint(self) -> list[int]:
        """Return numbers that change when files come, go or change size, or when one of a few of their rows changes."""
        numbers = [self.n_rows, self._files[0].d_model]
        for number, file in enumerate(self._files):
            for tensors in (self._activations, self._gradients or ()):
                for tensor in tensors[number : number + 1]:
                    few = tensor[[0, file.n_rows // 3, file.n_rows // 2, -1]] if file.n_rows else tensor
                    digest = hashlib.sha256(few.contiguous().view(torch.uint8).numpy().tobytes()).digest()
                    numbers += [file.n_rows, int.from_bytes(digest[:8], "big") >> 1]
        return numbers


_MISSING = "Save the activations under that name."
_NO_GRADIENTS = (
    "sparsifier=gradient needs the gradient of the language model's loss, summed over positions, with respect to each "
    "row. Save it under that name, or choose sparsifier=topk."
)


def _read_header(path: Path, name: str, way_out: str) -> FileFacts:
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            if name not in names:
                raise DataError(f"{path}: no tensor {name!r} in it." + suggest(name, names) + f" {way_out}")
            view = file.get_slice(name)
            shape, dtype = view.get_shape(), view.get_dtype()
    except SafetensorError as error:
        raise DataError(f"{path}: not a complete safetensors file ({error}). Write it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if dtype not in _DTYPES:
        raise DataError(f"{path}: {name!r} is of type {dtype}. Save floats: {', '.join(_DTYPES.values())}.")
    if len(shape) != 2 or shape[1] == 0:
        raise DataError(f"{path}: {name!r} has shape {shape}, not [n, d_model].")
    return FileFacts(path, shape[0], shape[1], _DTYPES[dtype])


def _check_gradients(fact: FileFacts) -> None:
    found = _read_header(fact.path, GRADIENTS, _NO_GRADIENTS)
    if (found.n_rows, found.d_model) != (fact.n_rows, fact.d_model):
        raise DataError(f"{fact.path}: {GRADIENTS!r} has shape {[found.n_rows, found.d_model]}, and {TENSOR!r} "
                        f"{[fact.n_rows, fact.d_model]}. Save one gradient for each activation.")  # fmt: skip


def _map(path: Path, name: str) -> Tensor:
    with safe_open(str(path), framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)  # mapped: pages are read when rows are
    return tensor
