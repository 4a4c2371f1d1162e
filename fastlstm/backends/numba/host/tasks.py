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
from numba.extending import overload

from fastlstm import cells
from fastlstm.backends import cpu
from fastlstm.backends.numba.host.arguments import (
    BACKWARD,
    FORWARD,
    REGION,
    STACK,
    TAILS,
    RegionArguments,
    StackArguments,
)
from fastlstm.backends.numba.host.compiling import compiled
from fastlstm.backends.numba.kernels.backward import backward, backward_matrix, backward_mixed
from fastlstm.backends.numba.kernels.forward import forward, forward_matrix, forward_mixed
from fastlstm.backends.numba.kernels.shared import named_for
from fastlstm.backends.numba.llvm import cells as cell_functions
from fastlstm.backends.numba.llvm.intrinsics import call, call_int
from fastlstm.backends.numba.llvm.loops import store_addresses, tables
from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES, Lanes
from fastlstm.cells.spec import Cell

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def _fingerprint() -> int:
    """A number of all sources a kernel is made of: numba's cache looks only at the file that a function stands in."""
    digest = hashlib.sha256()
    for folder in Path(cells.__file__).parent, Path(__file__).parents[1]:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


KERNELS = {
    "forward": (forward, FORWARD),
    "backward": (backward, BACKWARD),
    "forward_matrix": (forward_matrix, FORWARD),
    "backward_matrix": (backward_matrix, BACKWARD),
    "forward_mixed": (forward_mixed, FORWARD),
    "backward_mixed": (backward_mixed, BACKWARD),
}


def run_kernel(name, args, thread, threads):
    """Run the kernel of this name, a constant, on the struct at an address."""


@overload(run_kernel, prefer_literal=True)
def _run_kernel(name, args, thread, threads):
    kernel, record = KERNELS[name.literal_value]
    return lambda name, args, thread, threads: kernel(carray(args, 1, record)[0], thread, threads)


def _functions(fingerprint: int) -> tuple[dict[str, tuple[Any, Any]], Callable[[str], tuple[Any, Any]]]:
    """The tasks that are compiled, with their signatures, and what stores the addresses of a table."""
    task = nb.void(nb.voidptr, nb.intp, nb.intp)

    # What is closed over is part of the key of numba's cache: the number is to be, while a kernel or an intrinsic would
    # get another key in every process, and be compiled there again. So kernels are found by name.
    def task_of(name):
        @named_for(name)
        def run(args, thread, threads):
            if threads < fingerprint:
                run_kernel(name, args, thread, threads)

        return run, task

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

    def storing(name):
        @named_for(name)
        def store(target):
            if fingerprint != 0:
                store_addresses(name, target)

        return store, nb.void(nb.intp)

    return {
        **{name: task_of(name) for name in KERNELS},
        "stack": (stack_task, task),
        "region": (region, nb.void(nb.voidptr)),
    }, storing


_tasks, _storing = _functions(_fingerprint())


@cache
def _compiled(name: str) -> Any:
    function, signature = _tasks[name] if name in _tasks else _storing(name)
    return compiled(signature, function)


def _addresses(name: str) -> dict[str, int]:
    addresses = (ctypes.c_int64 * len(tables[name]))()
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(_compiled(name).address)(ctypes.addressof(addresses))
    return dict(zip(tables[name], addresses))


@cache
def primitives(size: int, pieces: int) -> dict[str, int]:
    """The addresses of the primitives for elements of `size` bytes, and the vectors they work on. `pieces`: what the
    matrix unit splits a number into, or 0 without it.
    """
    return {
        **_addresses(f"primitives{size}"),
        **(_addresses(f"matrix{pieces}") if pieces else {}),
        "size": size,
        "lanes": VECTOR_BYTES // size,
        "pieces": pieces,
    }


def table_of(cell: Cell, size: int) -> str:
    """The name of the table of a cell's own primitives for elements of `size` bytes. It has a digest of all that they
    are made from: cells of one name are not taken for each other, and those of one source share their code.
    """
    functions = cell_functions.functions_of(cell)
    digest = hashlib.sha256(functions.source.encode()).hexdigest()[:14]
    name = f"cell{size}.{digest}"
    if name not in tables:
        tables[name] = cell_functions.builders(Lanes(nb.float32 if size == 4 else nb.float64), functions)
    return name


@cache
def cell_primitives(cell: Cell, size: int) -> dict[str, int]:
    """The addresses of the primitives of `table_of`."""
    return _addresses(table_of(cell, size))


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
