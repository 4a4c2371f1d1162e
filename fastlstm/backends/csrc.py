"""The library of csrc/, which was compiled when the package was installed: its structures, and how it is called."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlstm.backends.cpu import address_of, openmp
from fastlstm.cells.library import gru, lstm

LIBRARY = Path(__file__).parents[1] / ("_native.dll" if os.name == "nt" else "_native.so")
VERSION = 6  # FASTLSTM_VERSION of csrc/fastlstm.h
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


def call(name: str, arguments: bytes, second_argument: Any) -> None:
    """Call a function that returns an error code, and raise a RuntimeError for any but FASTLSTM_OK."""
    code = getattr(library, name)(arguments, second_argument)
    if code:
        raise RuntimeError(f"{name}: {library.fastlstm_error_text(code).decode()}")


class Steps:
    """Runs single steps on packed weights, and on states that it reads and writes. It is called with the addresses of
    x (B, I) and of h (B, H), to which it writes the new state h once more.
    """

    def __init__(self, pack_key: tuple[int, ...], packed: Tensor, states: Sequence[Tensor], threads: bytes) -> None:
        """`pack_key`: the dtype, the instructions, the cell, I and H that the weights were packed for."""
        h, c = with_c(states)
        (*kind, I, H), B = pack_key, h.shape[0]
        self.holds, self.size, self.threads, self.h = (packed, h, c), h.nbytes, threads, h.data_ptr()
        c_0 = 0 if c is None else c.data_ptr()
        # The arguments of fastlstm_forward: a call writes two of them and passes two pointers, where fastlstm_step
        # would have twelve arguments to convert.
        no_weights, no_masks = (0,) * 8, (0, 0)  # two weights with row strides, two biases, two scales; reset, lengths
        before_x = VERSION, *kind, 1, B, I, H, 0
        x_to_h = 0, 0, I, *no_weights, packed.data_ptr(), 0, self.h, H, c_0, H, *no_masks, 0
        arguments = FORWARD.pack(*before_x, *x_to_h, 0, c_0, 0, 0)  # then h_n, c_n, c and gates
        self.x_word, self.h_n_word = len(before_x), len(before_x + x_to_h)
        self.h_0_word = self.x_word + x_to_h.index(self.h)
        self.arguments = ctypes.create_string_buffer(arguments, FORWARD.size)
        self.words = memoryview(self.arguments).cast("B").cast("q")

    def set_states(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Let later steps read the states at other addresses, and write the new ones to `after`."""
        self.words[self.h_0_word], self.h = before[0], after[0]
        if len(before) == 2:
            self.words[self.h_0_word + 2], self.words[self.h_n_word + 1] = before[1], after[1]

    def __call__(self, x: int, h: int) -> None:
        self.words[self.x_word], self.words[self.h_n_word] = x, h
        code = library.fastlstm_forward(self.arguments, self.threads)
        if code:
            raise RuntimeError(f"fastlstm_forward: {library.fastlstm_error_text(code).decode()}")
        ctypes.memmove(self.h, h, self.size)


def array(a: Tensor | None, leading: int) -> tuple[int, ...]:
    """Return the address of `a` and the strides of the `leading` axes before its last one, or zeros for None."""
    # 0 for a missing step axis
    return (0,) * (leading + 1) if a is None else (a.data_ptr(), *(0, *a.stride())[-1 - leading : -1])


def with_c(values: Sequence[Any]) -> Sequence[Any]:
    """Return the values of h and c, or of h and None for a cell without c."""
    return values if len(values) == 2 else (*values, None)
