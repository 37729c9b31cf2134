"""Reading foreign files safely: nothing in them is executed, and no more is read than an SAE can be.

Every reader gets its JSON and tensors here, checked for keys, kinds and shapes.
"""

import io
import json
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_train.errors import CheckpointError, suggest

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_GROWTH = 4
"""Bytes of an archive's content for each of its own bytes. Weights compress by less; a bomb by a thousand."""
MOST_JSON = 16 * 2**20
"""Bytes of a JSON file."""
MOST = 2**40
"""Largest whole number of a header."""
LONGEST = 60
"""Characters of a value that a message quotes."""


UNREADABLE = (OSError, ValueError, EOFError, MemoryError, OverflowError, RuntimeError, SafetensorError,
              zipfile.BadZipFile, zlib.error, SyntaxError)  # fmt: skip
"""What the libraries raise for damaged files. RuntimeError: torch, and JSON that is nested too deeply."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of reading a foreign file into a message for the user."""
    try:
        yield
    except UNREADABLE as error:
        why = str(error).strip().splitlines()
        raise CheckpointError(f"{path}: cannot be read: {why[0] if why else type(error).__name__}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        CheckpointError: it is missing, too large, not JSON, or not an object.
    """
    with explained(path):
        if not path.is_file():  # not a device, whose end never comes
            raise ValueError("no such file")
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many for a header")
        values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object with keys.")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with explained(path):
        return load_file(str(path))


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary that `torch.save` wrote, by the loader that executes nothing.

    Raises:
        CheckpointError: it is missing, damaged, wants to run code, unpacks to far more than its size, or holds no
            dictionary.
    """
    with explained(path):
        if zipfile.is_zipfile(path):
            _check_growth(path)
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not re.search(r"unsupported (global|class|operand|opcode)|disallowed|GLOBAL", str(error), re.IGNORECASE):
                raise ValueError("damaged, or not a file of torch.save") from error
            raise CheckpointError(
                f"{path}: holds more than tensors and plain values, so opening it could run code, and it is refused. "
                "Save a dictionary of tensors."
            ) from error
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"not a file of torch.save ({type(error).__name__})") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not a dictionary of named tensors.")
    return values


def read_npz(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Return the arrays of an .npz file, which must have exactly these names.

    Raises:
        CheckpointError: it is missing or damaged, holds other names or Python objects, or unpacks to far more than its
            size.
    """
    with explained(path):
        _check_growth(path)
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            check_names(path, members, names)
            return {name: _array(archive, members[name]) for name in names}


def _array(archive: zipfile.ZipFile, member: str) -> Tensor:
    file = io.BytesIO(archive.read(member))
    read_header = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}.get(read_magic(file))
    if read_header is None:
        raise ValueError(f"{member} has a version of .npy that this program does not read")
    shape, is_fortran, dtype = read_header(file)
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"{member} holds {dtype}, not floating-point numbers of at most 64 bits")
    data = file.read()
    if math.prod(shape) * dtype.itemsize != len(data):  # checked before anything of that size is made
        raise ValueError(f"{member} claims the shape {list(shape)} and holds {len(data):,} bytes")
    array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if is_fortran else "C")
    return torch.from_numpy(np.array(array, dtype=dtype.newbyteorder("="), order="C"))


def _check_growth(path: Path) -> None:
    """Refuse an archive whose content is far larger than the archive."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    size = path.stat().st_size
    if unpacked > MOST_GROWTH * size + 2**20:
        raise ValueError(f"{size:,} bytes unpack to {unpacked:,}; no file of weights does")


def check_names(path: Path, found: Collection[str], needed: Collection[str], *, optional: Collection[str] = ()) -> None:
    """Refuse tensors that are missing, or that the format does not have."""
    missing = sorted(set(needed) - set(found))
    extra = sorted(set(found) - set(needed) - set(optional))
    if missing:
        raise CheckpointError(
            f"{path}: lacks {', '.join(missing)}. It holds {', '.join(sorted(found)) or 'nothing'}. Give another file."
        )
    if extra:
        raise CheckpointError(
            f"{path}: holds {', '.join(extra)}, which this format does not have, so the SAE is of another kind. "
            f"Expected: {', '.join(sorted(needed))}."
        )


def check_shapes(path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what is no tensor of floating-point numbers, or has another shape.

    Example: `check_shapes(path, tensors, {"W_enc": (D, F), "b_enc": (F,)})`.
    """
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: {name} is of {kind}, not a tensor of floating-point numbers.")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}, and {list(shape)} was expected.")
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise CheckpointError(f"{path}: {name} does not hold a number for each of its entries.")


def matrix_sizes(path: Path, tensors: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Return rows and columns of the matrix `name`, from which the other shapes follow."""
    tensor = tensors[name]
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or 0 in tensor.shape:
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointError(f"{path}: {name} is {shape}, not a matrix.")
    return tensor.shape[0], tensor.shape[1]


def whole_number(path: Path, values: Mapping[str, Any], key: str, *, at_least: int = 1) -> int:
    """Return a whole number of a JSON header, which some programs write as 32.0."""
    value = values.get(key)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not at_least <= number <= MOST or number != int(number):
        raise CheckpointError(f"{path}: {key}={short(value)}: must be a whole number of at least {at_least}.")
    return int(number)


def flag(path: Path, values: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """Return a true or false of a JSON header."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key}={short(value)}: must be true or false.")
    return value


def number(values: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a JSON header, or None where there is none."""
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -MOST <= value <= MOST:
        return None
    return float(value)


def short(value: Any) -> str:
    """Return a value of a header for a message."""
    text = repr(value) if not isinstance(value, int) or abs(value) <= MOST else "a huge number"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def choice(path: Path, values: Mapping[str, Any], key: str, known: Collection[str]) -> str:
    """Return a word of a JSON header, which must be one of `known`."""
    value = values.get(key)
    if not isinstance(value, str) or value not in known:
        hint = suggest(short(value), known)
        raise CheckpointError(f"{path}: {key}={short(value)}: this program does not open such SAEs.{hint}")
    return value


def precision_note(tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence where tensors are not fp32, and so are cast; else nothing."""
    kinds = {
        str(t.dtype).removeprefix("torch.") for t in tensors.values() if isinstance(t, Tensor) and t.is_floating_point()
    }
    other = sorted(kinds - {"float32"})
    return (f"its numbers are {' and '.join(other)}, and are cast to float32.",) if other else ()
