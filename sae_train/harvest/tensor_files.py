"""Activations in `*.safetensors` files, as one table of rows in sorted file order, mapped into memory.

The files come from anywhere, so everything about them is checked. Where gradients are read, too, each file holds them
beside the activations, and a row is both, one behind the other. Letters: N rows asked for, D d_model, W width of a row:
D or 2 D.
"""

import hashlib
from collections.abc import Iterator
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
    path: Path
    n_rows: int
    d_model: int
    dtype: str


def read_headers(directory: str, *, key: str, gradients: bool = False) -> list[FileFacts]:
    """Return what the headers of a directory's files say, in sorted order.

    Args:
        directory: of the files.
        key: the setting that named it, for messages.
        gradients: whether each file must hold `gradients` beside its activations.

    Raises:
        DataError: no such directory, no files, or one that does not hold `activations` [n, d_model] in floats, or
            `gradients` of the same shape where they are asked for.
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
    """All rows of a directory's files, by index.

    Attributes:
        halves: activations, and gradients where rows hold them.
    """

    def __init__(self, directory: str, *, key: str, dtype: torch.dtype, gradients: bool = False) -> None:
        """Args:
        directory: of the files.
        key: the setting that named it, for messages.
        dtype: rows are returned in.
        gradients: whether rows hold the gradients, too.
        """
        self.files = read_headers(directory, key=key, gradients=gradients)
        self.d_model = self.files[0].d_model
        self.dtype = dtype
        names = (TENSOR, GRADIENTS) if gradients else (TENSOR,)
        self._tensors = [tuple(_map(fact.path, name) for name in names) for fact in self.files]
        self.halves = [RowTable(tensors) for tensors in zip(*self._tensors, strict=True)]
        self._starts = self.halves[0].starts
        self.n_rows = int(self._starts[-1])

    def rows(self, index_N: Tensor) -> Tensor:
        """Return the rows [N, W] at int64 indices, in their order, on the CPU."""
        found = [half.rows(index_N, dtype=self.dtype) for half in self.halves]
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Yield (first row, activations [N, D] and, where they are read, gradients) over start..stop in order.

        They are in the files' own number format.
        """
        for file, fact in enumerate(self.files):
            offset = int(self._starts[file])
            low, high = max(start - offset, 0), min(stop - offset, fact.n_rows)
            size = max(1, _SPAN_ELEMENTS // self.d_model)
            for at in range(low, high, size):
                yield offset + at, tuple(tensor[at : min(at + size, high)] for tensor in self._tensors[file])

    def place(self, row: int) -> str:
        """Return 'file, row n' for a row of the table, for messages."""
        file = int(torch.searchsorted(self._starts, row, right=True)) - 1
        return f"{self.files[file].path}, row {row - int(self._starts[file])}"

    def fingerprint(self) -> list[int]:
        """Return numbers that change when files come, go or change size, or one of a few of their rows does."""
        numbers = [self.n_rows, self.d_model]
        for fact, tensors in zip(self.files, self._tensors, strict=True):
            for tensor in tensors:
                few = tensor[[0, fact.n_rows // 3, fact.n_rows // 2, -1]] if fact.n_rows else tensor
                digest = hashlib.sha256(few.contiguous().view(torch.uint8).numpy().tobytes()).digest()
                numbers += [fact.n_rows, int.from_bytes(digest[:8], "big") >> 1]
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
