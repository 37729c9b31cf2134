"""How kernels that Numba compiles run on the threads that torch keeps for its own operations.

Threads of their own would take turns with torch's, which go on spinning between its operations: a step of 55 ms then
takes 70. So a kernel is a function of a pointer to its arguments, given to the OpenMP that torch itself is linked to.
Every thread of the team calls it, finds out which one it is, and does its `share` of rows or groups; nothing that is
written depends on how many they are.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import cfunc, float32, njit, types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic
from torch import Tensor

SIGNATURE = types.void(types.CPointer(types.int64))
"""Of a kernel: the addresses of its tensors, and integers."""
SUMS = {"reassoc", "contract", "nsz"}
"""What may be done to sums so that they run in vector registers: a fixed order still, and NaN stays NaN."""


def _of_torchs_openmp(name: str) -> Any:
    """Return a function of the OpenMP that torch is linked to: looked up from torch, not by a library's name.

    Raises:
        ImportError: there is none, or none of that name.
    """
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError) as error:
        raise ImportError(f"torch's OpenMP has no {name} ({error})") from error


_parallel = _of_torchs_openmp("GOMP_parallel")
_parallel.argtypes, _parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
for _name in ("omp_get_thread_num", "omp_get_num_threads"):
    _address = ctypes.cast(_of_torchs_openmp(_name), ctypes.c_void_p).value
    binding.add_symbol(f"sae_train_{_name}", _address)  # by name, so that compiled code can be kept in a file
thread = types.ExternalFunction("sae_train_omp_get_thread_num", types.int32())
"""Which of the team's threads this is, in a kernel."""
_OWNER = os.getpid()
team = types.ExternalFunction("sae_train_omp_get_num_threads", types.int32())
"""How many threads the team has, in a kernel."""


def _digest() -> str:
    """Return what changes with any of our kernels' source: Numba looks at the file alone that a kernel stands in."""
    sources = sorted(Path(__file__).parent.glob("numba_*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


_DIGEST = _digest()


class Kernel:
    """Decorates what is compiled when it is first run, or taken from the file that an earlier process left.

    A run needs half of the kernels, and most take half a second.
    A kernel must not allocate: Numba lets nobody know of what it raises.
    """

    def __init__(self, body: Callable[..., None]) -> None:
        body.__qualname__ += f"_{_DIGEST}"
        self._body = body
        self._compiled: Any = None

    @property
    def compiled(self) -> Any:
        """Numba's function of it; threads that ask for it at once get one each."""
        if self._compiled is None:
            try:
                self._compiled = cfunc(SIGNATURE, cache=True)(self._body)
            except Exception:  # no place for the file, no space, or a broken one, of which pickle says anything at all;
                # a fault of ours is raised again here, with its traceback
                self._compiled = cfunc(SIGNATURE)(self._body)
        return self._compiled


# A fork waits until what another thread compiles is done: the child would wait for that thread for ever.
os.register_at_fork(
    before=global_compiler_lock.acquire,
    after_in_parent=global_compiler_lock.release,
    after_in_child=global_compiler_lock.release,
)


def run(which: Kernel, *given: Tensor | int) -> None:
    """Run a kernel on torch's threads, and wait for it.

    Args:
        which: what to run.
        given: what it takes, in its order; tensors are contiguous.
    """
    assert all(each.is_contiguous() for each in given if isinstance(each, Tensor))
    words = np.array([each.data_ptr() if isinstance(each, Tensor) else each for each in given], dtype=np.int64)
    n_threads = torch.get_num_threads() if os.getpid() == _OWNER else 1  # a forked child has none of torch's threads
    _parallel(which.compiled.address, words.ctypes.data, n_threads, 0)


@intrinsic
def at(typing_context, address):
    """Return an address as a pointer, for `carray`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


_WIDE = '"prefer-vector-width"="512"'


def _can_be_wide() -> bool:
    """Return whether functions may ask for vectors of 512 bits, on processors that lose no clock by them.

    Those with AMX, for which LLVM chooses 256 all the same. llvmlite has a list of attributes that does not know the
    one that says so; whether it takes it by the way that `wide` goes is tried on an empty function.
    """
    if not binding.get_host_cpu_features().get("amx-bf16", False):
        return False
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "tried")
    ir.IRBuilder(function.append_basic_block()).ret_void()
    try:
        set.add(function.attributes, _WIDE)
        return _WIDE in str(binding.parse_assembly(str(module)))
    except (TypeError, RuntimeError):
        return False


_IS_WIDE = _can_be_wide()


@intrinsic
def wide(typing_context):
    """Let the loops of the function that calls this use vectors of 512 bits where that is faster."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _IS_WIDE:
            set.add(builder.function.attributes, _WIDE)
        return context.get_dummy_value()

    return types.void(), code


@njit
def share(n: int):
    """Return lo, hi of this thread's part of n."""
    return n * thread() // team(), n * (thread() + 1) // team()


@intrinsic
def number(typing_context, bits):
    """Return the bits of a bf16 in a uint16, or of an fp32 in a uint32, as fp32; an fp32 is one already."""
    if bits == types.float32:
        return types.float32(bits), lambda context, builder, signature, arguments: arguments[0]
    if bits not in (types.uint16, types.uint32):
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = arguments[0]
        if bits == types.uint16:
            word = builder.shl(builder.zext(word, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(bits), code


WORD = 64
"""Entries that are compared together."""


def _alike(entries: Any, bound: Any) -> bool:
    return bound == entries.dtype or (isinstance(bound, types.Array) and bound.dtype == entries.dtype)


@intrinsic
def between(typing_context, row_F, place, low, high):
    """Return which of WORD entries of a row, from `place` on, are between two, a bit each, the first the lowest.

    Integers count as unsigned; NaN is between nothing. Each of `low` and `high` is a number, or a row of as many.
    """
    if not (_alike(row_F, low) and _alike(row_F, high)):
        return None

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = context.get_value_type(row_F.dtype)
        vector = ir.VectorType(kind, WORD)

        def entries(which: int) -> Any:
            if not isinstance(signature.args[which], types.Array):
                first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[which], cgutils.int32_t(0))
                everywhere = ir.Constant(ir.VectorType(cgutils.int32_t, WORD), None)
                return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), everywhere)
            row = context.make_array(signature.args[which])(context, builder, value=arguments[which])
            address = builder.bitcast(builder.gep(row.data, [arguments[1]]), vector.as_pointer())
            return builder.load(address, align=row_F.dtype.bitwidth // 8)

        compare = builder.icmp_unsigned if isinstance(kind, ir.IntType) else builder.fcmp_ordered
        found = entries(0)
        flags = builder.and_(compare(">=", found, entries(2)), compare("<=", found, entries(3)))
        return builder.bitcast(flags, ir.IntType(WORD))

    return types.uint64(row_F, types.int64, low, high), code


LINE, FETCHED = 64, 512
"""Bytes of a cache line, and of a row that are asked for at most: what follows the processor asks for by itself."""
AHEAD = 4
"""Rows between the one that is read and the one that is asked for: in no order, they come from far in a cache."""


@intrinsic
def _fetch_line(typing_context, address):
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, *[cgutils.int32_t] * 3])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        to_read, into_all, of_data = (cgutils.int32_t(number) for number in (0, 3, 1))
        builder.call(prefetch, [builder.inttoptr(arguments[0], cgutils.voidptr_t), to_read, into_all, of_data])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def _place_of(typing_context, row):
    """Return where a row begins, and its number's size in bytes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(row)(context, builder, value=arguments[0]).data
        both = builder.ptrtoint(data, ir.IntType(64)), ir.Constant(ir.IntType(64), row.dtype.bitwidth // 8)
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(types.int64, 2)(row), code


@njit
def fetch(row_D):
    """Have a row brought into cache, and do not wait for it."""
    first, size = _place_of(row_D)
    for line in range(first, first + min(len(row_D) * size, FETCHED), LINE):
        _fetch_line(line)


@intrinsic
def first_bit(typing_context, word):
    """Return the place of the lowest bit that is set, of a word that is not 0."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return (types.int64(types.uint64), code) if word == types.uint64 else None


@intrinsic
def of(typing_context, bound, entry):
    """Return a number, or that of a row at a place."""
    if not isinstance(bound, types.Array):
        return bound(bound, types.int64), lambda context, builder, signature, arguments: arguments[0]

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row = context.make_array(bound)(context, builder, value=arguments[0])
        return builder.load(builder.gep(row.data, [arguments[1]]))

    return bound.dtype(bound, types.int64), code


@intrinsic
def bits_of(typing_context, number):
    """Return an fp32 as its bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return (types.uint32(types.float32), code) if number == types.float32 else None


@njit(fastmath=SUMS)
def product(a_D, b_D):
    """Return the inner product of two rows of fp32."""
    wide()
    total = float32(0)
    for d in range(len(a_D)):
        total += a_D[d] * b_D[d]
    return total
