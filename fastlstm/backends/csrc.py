"""The library of csrc/, which was compiled when the package was installed: its structures, and how it is called."""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlstm.backends.cpu import address_of, openmp
from fastlstm.cells.library import gru, lstm

LIBRARY = Path(__file__).parents[1] / ("_native.dll" if os.name == "nt" else "_native.so")
VERSION = 7  # FASTLSTM_VERSION of csrc/fastlstm.h
# fastlstm_forward_args, _backward_args and _threads of that header, field by field: 9 int64 from version to reverse,
# then each array's address (P) with its row strides (q), in the order of the header
FORWARD = struct.Struct("@9q Pqq Pq Pq PPPPPP Pq Pq PP PPP PP")
BACKWARD = struct.Struct("@9q Pqq Pq Pq Pq Pq PP PPP Pqq Pqq Pq Pq PPP PP PP")
THREADS = struct.Struct("@qPP")
FORWARD_FIELDS = len(FORWARD.unpack(bytes(FORWARD.size)))
CELLS = {lstm: 0, gru: 1}  # enum fastlstm_cell
instructions = 0  # enum fastlstm_instructions; 0 is the processor's widest


def _load() -> ctypes.CDLL | str:
    """Return the library, or the reason why there is none."""
    if not LIBRARY.exists():
        return (
            f"the native backend needs {LIBRARY.name}, which is built when fastlstm is installed and a GCC or Clang is "
            "there: this installation has none"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the native backend's {LIBRARY.name} cannot be loaded: {error}"
    if library.fastlstm_version() != VERSION:
        return f"the native backend's {LIBRARY.name} is of another version: install fastlstm again"
    for function in (library.fastlstm_forward, library.fastlstm_backward):
        function.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    library.fastlstm_pack.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.fastlstm_steps_make.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p]
    library.fastlstm_packed_size.argtypes = [ctypes.c_int64] * 5
    library.fastlstm_packed_size.restype = ctypes.c_size_t
    library.fastlstm_lanes.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.fastlstm_lanes.restype = ctypes.c_int64
    library.fastlstm_error_text.restype = ctypes.c_char_p
    return library


library: Any = _load()  # at import, since tracers cannot trace it; it takes less than a millisecond
reason = library if isinstance(library, str) else None


@cache
def openmp_functions() -> Any:
    """Return a fastlstm_openmp with the functions of torch's OpenMP, or None."""
    functions = openmp()
    if functions is None:
        return None
    return (ctypes.c_void_p * 3)(address_of(functions[0]), *functions[1:])


@cache
def threads_argument(count: int) -> bytes:
    """Return a fastlstm_threads for `count` threads, of torch's own pool if it has one."""
    functions = openmp_functions()
    if functions is None:  # the library has a pool of its own
        return THREADS.pack(count, 0, 0)
    return THREADS.pack(count, address_of(library.fastlstm_parallel_openmp), ctypes.addressof(functions))


def call(name: str, *arguments: Any) -> None:
    """Call a function that returns an error code, and raise a RuntimeError for any but FASTLSTM_OK."""
    code = getattr(library, name)(*arguments)
    if code:
        raise RuntimeError(f"{name}: {library.fastlstm_error_text(code).decode()}")


class Steps:
    """Runs single steps on packed weights, and on states that it reads and writes. It is called with the addresses of x
    (B, I) and of h (B, H), to which it writes the new state h once more.
    """

    packs_weights = True  # each of these has packed weights of its own

    def __init__(self, arguments: bytes, threads: bytes, states: Sequence[Tensor]) -> None:
        """`arguments`: a fastlstm_forward_args with the weights, which are copied."""
        h, c = with_c(states)
        self.states, self.h, self.size = states, h.data_ptr(), h.nbytes
        steps, self.x, self.h_next = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        call("fastlstm_steps_make", arguments, threads, ctypes.byref(steps))
        # At the end of the process they stay: a daemon thread may still run steps.
        weakref.finalize(self, library.fastlstm_steps_free, steps).atexit = False
        c_address = None if c is None else c.data_ptr()
        self.before = ctypes.c_void_p(self.h), ctypes.c_void_p(c_address)
        self.c_next = ctypes.c_void_p(c_address)
        self.arguments = steps, self.x, *self.before, self.h_next, self.c_next

    def set_states(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Let later steps read the states at other addresses, and write the new ones to `after`."""
        self.before[0].value, self.h = before[0], after[0]
        if len(before) == 2:
            self.before[1].value, self.c_next.value = before[1], after[1]

    def __call__(self, x: int, h: int) -> None:
        self.x.value, self.h_next.value = x, h
        code = library.fastlstm_step(*self.arguments)
        if code:
            raise RuntimeError(f"fastlstm_step: {library.fastlstm_error_text(code).decode()}")
        ctypes.memmove(self.h, h, self.size)


def array(a: Tensor | None, leading: int) -> tuple[int, ...]:
    """Return the address of `a` and the strides of the `leading` axes before its last one, or zeros for None."""
    # 0 for a missing step axis
    return (0,) * (leading + 1) if a is None else (a.data_ptr(), *(0, *a.stride())[-1 - leading : -1])


def with_c(values: Sequence[Any]) -> Sequence[Any]:
    """Return the values of h and c, or of h and None for a cell without c."""
    return values if len(values) == 2 else (*values, None)
