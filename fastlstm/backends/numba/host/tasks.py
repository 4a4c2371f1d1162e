"""The kernels compiled: C functions by address, and the team of threads that runs them."""

import ctypes
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray
from numba import types as nb

from fastlstm import cells
from fastlstm.backends import cpu
from fastlstm.backends.numba.host.arguments import (
    BACKWARD,
    FORWARD,
    QUANTIZED,
    REGION,
    STACK,
    TAILS,
    RegionArguments,
    StackArguments,
)
from fastlstm.backends.numba.host.compiling import compiled
from fastlstm.backends.numba.kernels.backward import backward, backward_matrix, backward_mixed
from fastlstm.backends.numba.kernels.forward import forward, forward_matrix, forward_mixed
from fastlstm.backends.numba.kernels.quantized import quantized
from fastlstm.backends.numba.kernels.shared import named_for
from fastlstm.backends.numba.llvm import amx, matrix, rounding
from fastlstm.backends.numba.llvm import cells as cell_functions
from fastlstm.backends.numba.llvm import quantized as quantized_functions
from fastlstm.backends.numba.llvm.cells import store_addresses as store_cell_addresses
from fastlstm.backends.numba.llvm.intrinsics import call, call_int
from fastlstm.backends.numba.llvm.matrix import store_addresses as store_matrix_addresses
from fastlstm.backends.numba.llvm.primitives import NAMES, store_addresses
from fastlstm.backends.numba.llvm.quantized import store_addresses as store_quantized_addresses
from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES
from fastlstm.cells.spec import Cell

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def _fingerprint() -> int:
    """A number of all sources a kernel is made of: numba's cache looks only at the file that a function stands in."""
    digest = hashlib.sha256()
    for folder in Path(cells.__file__).parent, Path(__file__).parents[1]:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


def _functions(fingerprint: int) -> tuple[dict[str, tuple[Any, Any]], dict[str, Callable[[int], tuple[Any, Any]]]]:
    """All functions that are compiled, with their signatures, and those of the cell of a number, see `number_of`."""

    # What is closed over is part of the key of numba's cache: the number is to be, while a kernel or an intrinsic would
    # get another key in every process, and be compiled there again.
    def forward_task(args, thread, threads):
        if threads < fingerprint:
            forward(carray(args, 1, FORWARD)[0], thread, threads)

    def backward_task(args, thread, threads):
        if threads < fingerprint:
            backward(carray(args, 1, BACKWARD)[0], thread, threads)

    def forward_matrix_task(args, thread, threads):
        if threads < fingerprint:
            forward_matrix(carray(args, 1, FORWARD)[0], thread, threads)

    def backward_matrix_task(args, thread, threads):
        if threads < fingerprint:
            backward_matrix(carray(args, 1, BACKWARD)[0], thread, threads)

    def forward_mixed_task(args, thread, threads):
        if threads < fingerprint:
            forward_mixed(carray(args, 1, FORWARD)[0], thread, threads)

    def backward_mixed_task(args, thread, threads):
        if threads < fingerprint:
            backward_mixed(carray(args, 1, BACKWARD)[0], thread, threads)

    def quantized_task(args, thread, threads):
        if threads < fingerprint:
            quantized(carray(args, 1, QUANTIZED)[0], thread, threads)

    def stack_task(args, thread, threads):
        a = carray(args, 1, STACK)[0]
        for lane in range(thread, a.lanes, threads):
            for k in range(lane, a.count, a.lanes):
                if k < fingerprint:
                    call(a.task, a.first + k * a.bytes, 0, 1)

    def region(args):
        a = carray(args, 1, REGION)[0]
        size = call_int(a.team_size)
        if size < fingerprint:
            call(a.task, a.arguments, call_int(a.thread_number), size)

    def primitives32(target):
        if fingerprint != 0:
            store_addresses(np.float32(0), target)

    def primitives64(target):
        if fingerprint != 0:
            store_addresses(np.float64(0), target)

    def matrix_primitives(pieces):
        @named_for(pieces)
        def store(target):
            if fingerprint != 0:
                store_matrix_addresses(pieces, target)

        return store, nb.void(nb.intp)

    def cell_primitives(number):
        @named_for(number)
        def store(target):
            if fingerprint != 0:
                store_cell_addresses(number, target)

        return store, nb.void(nb.intp)

    def quantized_primitives(pieces, number):
        @named_for(f"{number}.{pieces}")
        def store(target):
            if fingerprint != 0:
                store_quantized_addresses(number, pieces, target)

        return store, nb.void(nb.intp)

    task = nb.void(nb.voidptr, nb.intp, nb.intp)
    return {
        "forward": (forward_task, task),
        "backward": (backward_task, task),
        "forward_matrix": (forward_matrix_task, task),
        "backward_matrix": (backward_matrix_task, task),
        "forward_mixed": (forward_mixed_task, task),
        "backward_mixed": (backward_mixed_task, task),
        "quantized": (quantized_task, task),
        "stack": (stack_task, task),
        "region": (region, nb.void(nb.voidptr)),
        "primitives4": (primitives32, nb.void(nb.intp)),
        "primitives8": (primitives64, nb.void(nb.intp)),
        **{f"matrix{pieces}": matrix_primitives(pieces) for pieces in amx.PRODUCTS},
    }, {
        "cell": cell_primitives,
        **{f"quantized{pieces}": partial(quantized_primitives, pieces) for pieces in rounding.TOP},
    }  # fmt: skip


_sources, _of_cell = _functions(_fingerprint())


@cache
def _compiled(name: str, number: int | None = None) -> Any:
    function, signature = _sources[name] if number is None else _of_cell[name](number)
    return compiled(signature, function)


def _addresses(name: str, names: tuple[str, ...], number: int | None = None) -> dict[str, int]:
    addresses = (ctypes.c_int64 * len(names))()
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(_compiled(name, number).address)(ctypes.addressof(addresses))
    return dict(zip(names, addresses))


@cache
def primitives(size: int, pieces: int) -> dict[str, int]:
    """The addresses of the primitives for elements of `size` bytes, and the vectors they work on. `pieces`: what the
    matrix unit splits a number into, or 0 without it.
    """
    of_matrix = _addresses(f"matrix{pieces}", matrix.NAMES) if pieces else {}
    return {
        **_addresses(f"primitives{size}", NAMES),
        **of_matrix,
        "size": size,
        "lanes": VECTOR_BYTES // size,
        "pieces": pieces,
    }


def number_of(cell: Cell, size: int) -> int:
    """The number that a cell's own primitives for elements of `size` bytes are compiled by: of all that they are made
    from. Cells of one name are not taken for each other, and those of one source share their code.
    """
    functions, scalar = cell_functions.functions_of(cell), nb.float32 if size == 4 else nb.float64
    digest = hashlib.sha256(f"{functions.source} {scalar}".encode()).digest()
    number = int.from_bytes(digest[:7], "little")
    cell_functions.known[number] = scalar, functions
    return number


@cache
def cell_primitives(cell: Cell, size: int) -> dict[str, int]:
    """The addresses of a cell's own primitives, for elements of `size` bytes."""
    return _addresses("cell", cell_functions.NAMES, number_of(cell, size))


@cache
def quantized_primitives(cell: Cell, pieces: int) -> dict[str, int]:
    """The addresses of the primitives of an int8 layer, for numbers of so many bytes."""
    return _addresses(f"quantized{pieces}", quantized_functions.NAMES, number_of(cell, 4))


@cache
def task(name: str) -> Any:
    """The C function of this name, callable through ctypes without the interpreter lock."""
    return _TASK(_compiled(name).address)


_submitting = threading.Lock()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="fastlstm")


@cache
def relax() -> int:
    """The address of sched_yield, which a waiting thread calls, or 0."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


def ready(name: str, arguments: ctypes.Structure, threads: int) -> Callable[[], object]:
    """Runs a task with these arguments, which the caller keeps, on `threads` threads; one thread is a plain call, with
    no parallel region at all.
    """
    function, address = task(name), ctypes.addressof(arguments)
    if threads == 1:
        return partial(function, *map(ctypes.c_int64, (address, 0, 1)))  # ctypes would convert ints in each call
    openmp = cpu.openmp()
    if openmp is None:
        return partial(_run_in_pool, function, address, threads)
    parallel, thread_number, team_size = openmp
    data = RegionArguments(_compiled(name).address, address, thread_number, team_size)
    return partial(parallel, _compiled("region").address, ctypes.byref(data), threads, 0)  # which keeps the data


def _run_in_pool(function: Any, address: int, threads: int) -> None:
    with _submitting:  # a team is queued whole: two that wait for each other's members would never end
        others = [_pool(threads).submit(function, address, k, threads) for k in range(1, threads)]
    function(address, 0, threads)
    for other in others:
        other.result()


def run_stack(
    name: str, arguments: ctypes.Structure, groups: int, by_group: dict[str, int], by_lane: dict[str, int], lanes: int
) -> None:
    """Run a task for each group of a stack, each on one thread, `lanes` at a time.

    `arguments` are the first group's; a group's addresses lie so many bytes further for each group before it, or for
    each lane. An absent address stays absent.
    """
    first = np.frombuffer(bytes(arguments), np.int64)
    steps = np.zeros((2, len(first)), np.int64)
    for to, by in zip(steps, (by_group, by_lane)):
        for field, step in by.items():
            to[getattr(type(arguments), field).offset // 8] = step
    group = np.arange(groups)
    times = np.stack((group, group % lanes), axis=1)
    many = first + times @ steps * (first != 0)
    for field in TAILS:  # each struct has its own, as far behind its start
        place = getattr(arguments, field) - ctypes.addressof(arguments)
        many[:, getattr(type(arguments), field).offset // 8] = many.ctypes.data + group * first.nbytes + place
    stack = StackArguments(_compiled(name).address, many.ctypes.data, many.strides[0], groups, lanes)
    ready("stack", stack, lanes)()
