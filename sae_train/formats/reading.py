"""Reading foreign files safely: nothing in them is executed, and no more is read than an SAE can be.

Every reader gets its JSON and tensors here, checked for keys, kinds and shapes.
"""

import json
import lzma
import math
import pickle
import re
import reprlib
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
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
MOST_NAMES = 12
"""Names that a message lists."""
ARCHIVE = b"PK\x03\x04"
"""First bytes of a file of torch.save. Files of torch before 1.6 are bare pickles."""


UNREADABLE = (OSError, ValueError, EOFError, MemoryError, OverflowError, RuntimeError, SafetensorError, SyntaxError,
              zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError)  # fmt: skip
"""What the libraries raise for damaged files. RuntimeError: torch, and JSON that is nested too deeply."""

_QUOTED = reprlib.Repr()
_QUOTED.maxstring = _QUOTED.maxother = LONGEST


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of reading a foreign file into a message for the user."""
    try:
        yield
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: cannot be read: {reason_of(error)}.") from error


def reason_of(error: Exception) -> str:
    """Return the first line of an error for a message, without control characters. Damaged files are quoted in it."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return printable(text[: 4 * LONGEST])


def printable(text: str) -> str:
    """Return a text out of a file without control characters, which could change a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        CheckpointError: it is missing, too large, not JSON, not an object, or gives one key twice.
    """
    with explained(path):
        if not path.is_file():  # not a device, whose end never comes
            raise ValueError("not a file" if path.exists() else "no such file")
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many for a header")
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object with keys.")
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. A key that is given twice has no meaning on which programs agree."""
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"the key {short(twice)} is given twice")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with explained(path):
        path.open("rb").close()  # safetensors tells a file without permission as one that is not there
        return load_file(str(path))


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary that `torch.save` wrote, by the loader that executes nothing.

    Raises:
        CheckpointError: it is missing, damaged, a bare pickle, wants to run code, unpacks to far more than its size, or
            holds no dictionary.
    """
    with explained(path):
        with path.open("rb") as file:
            is_archive = file.read(len(ARCHIVE)) == ARCHIVE
        if not is_archive:  # of a bare pickle, torch takes memory for each size that it claims
            raise CheckpointError(
                f"{path}: is no archive of torch.save. It is damaged, or a bare pickle, which could run code and claim "
                "any size. Save a dictionary of tensors with torch.save of torch 1.6 or later."
            )
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
        except UNREADABLE:
            raise
        except Exception as error:  # of damaged operands, torch's loader raises errors of any kind
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
            members = {each.filename.removesuffix(".npy"): each for each in archive.infolist()}
            check_names(path, members, names)
            if len(members) != len(archive.infolist()):
                raise ValueError("it holds one array twice")
            return {name: _array(archive, members[name]) for name in names}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    name = member.filename
    with archive.open(member) as file:
        read_header = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}.get(read_magic(file))
        if read_header is None:
            raise ValueError(f"{name} has a version of .npy that this program does not read")
        shape, is_fortran, dtype = read_header(file)
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise ValueError(f"{name} holds {dtype}, not floating-point numbers of at most 64 bits")
        n_bytes = member.file_size - file.tell()
        if (
            any(isinstance(size, bool) for size in shape) or math.prod(shape) * dtype.itemsize != n_bytes
        ):  # checked before anything of that size is made
            raise ValueError(f"{name} claims the shape {list(shape)} and holds {n_bytes:,} bytes")
        array = np.frombuffer(file.read(n_bytes), dtype=dtype).reshape(shape, order="F" if is_fortran else "C")
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
            f"{path}: lacks {', '.join(missing)}. It holds {listed(found) or 'nothing'}. Give another file."
        )
    if extra:
        raise CheckpointError(
            f"{path}: holds {listed(extra)}, which this format does not have, so the SAE is of another kind. "
            f"Expected: {', '.join(sorted(needed))}."
        )


def listed(names: Collection[str]) -> str:
    """Return names out of a file for a message: the first few, and no control characters."""
    chosen = sorted(names)[:MOST_NAMES]
    shown = [each if each.isprintable() and len(each) <= LONGEST else short(each) for each in chosen]
    more = len(names) - len(chosen)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def check_shapes(path: Path, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse what is no tensor of floating-point numbers, or has another shape.

    Example: `check_shapes(path, tensors, {"W_enc": (D, F), "b_enc": (F,)})`.
    """
    for name, shape in shapes.items():
        tensor = tensors[name]
        if isinstance(tensor, Tensor) and not is_plain(tensor):
            raise CheckpointError(f"{path}: {name} does not hold a number for each of its entries.")
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: {name} is of {kind}, not a tensor of floating-point numbers.")
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}, and {list(shape)} was expected.")


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds a number for each entry, as meta, sparse and repeated ones do not."""
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def matrix_sizes(path: Path, tensors: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Return rows and columns of the matrix `name`, from which the other shapes follow."""
    tensor = tensors[name]
    is_tensor = isinstance(tensor, Tensor) and not tensor.is_nested  # a nested one has no shape
    if not is_tensor or tensor.ndim != 2 or 0 in tensor.shape:
        shape = list(tensor.shape) if is_tensor else type(tensor).__name__
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
    try:
        text = _QUOTED.repr(value) if not isinstance(value, int) or abs(value) <= MOST else "a huge number"
    except ValueError:  # a number inside of it has too many digits to be printed
        text = f"a {type(value).__name__}"
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
