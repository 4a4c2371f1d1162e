"""The kernels compiled: C functions by address, and the team of threads that runs them."""

import ctypes
import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
from numba import types as nb
from numba.extending import intrinsic

from fastlstm.backends import cpu
from fastlstm.backends.numba.host.arguments import (
    TAILS,
    BackwardArguments,
    ForwardArguments,
    RegionArguments,
    StackArguments,
)
from fastlstm.backends.numba.host.compiling import Progress, compiled
from fastlstm.backends.numba.kernels.backward import backward, backward_matrix, backward_mixed
from fastlstm.backends.numba.kernels.forward import forward, forward_matrix, forward_mixed
from fastlstm.backends.numba.kernels.shared import jit
from fastlstm.backends.numba.llvm import cells as cell_functions
from fastlstm.backends.numba.llvm.emit import fields_of, run
from fastlstm.backends.numba.llvm.intrinsics import call, call_int
from fastlstm.backends.numba.llvm.loops import store_addresses, tables
from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES, Lanes
from fastlstm.backends.numba.llvm.sources import fingerprint
from fastlstm.cells.spec import Cell

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@jit
def stack(a, thread, threads):
    """This thread's tasks of a stack."""
    for lane in range(thread, a.lanes, threads):
        for k in range(lane, a.count, a.lanes):
            call(a.task, a.first + k * a.bytes, 0, 1)


@jit
def region(a, thread, threads):
    """What each thread of an OpenMP team runs."""
    call(a.task, a.arguments, call_int(a.thread_number), call_int(a.team_size))


# What is so where a cell takes no means and a layer has one head: the loops over phases and heads are compiled away. A
# field has a value that is known, or that of another field.
PLAIN: dict[str, int | str] = {"phases": 1, "heads": 1, "head": "H", "span": "H"}
_PLAIN_BACK = PLAIN | {"reach": "panels"}
KERNELS: dict[str, tuple[Any, Any, dict[str, int | str]]] = {
    "forward": (forward, ForwardArguments, PLAIN),
    "backward": (backward, BackwardArguments, _PLAIN_BACK),
    "forward_across": (forward, ForwardArguments, {}),
    "backward_across": (backward, BackwardArguments, {}),
    "forward_matrix": (forward_matrix, ForwardArguments, PLAIN),
    "backward_matrix": (backward_matrix, BackwardArguments, _PLAIN_BACK),
    "forward_mixed": (forward_mixed, ForwardArguments, PLAIN),
    "backward_mixed": (backward_mixed, BackwardArguments, _PLAIN_BACK),
    "stack": (stack, StackArguments, {}),
    "region": (region, RegionArguments, {}),
}


@intrinsic(prefer_literal=True)
def emit_task(typingctx, name, address, thread, threads):
    """The task of this name, a constant: to run a kernel on the struct at an address, or to store a table there."""

    def codegen(context, b, signature, values):
        if name.literal_value in tables:
            store_addresses(b, name.literal_value, values[1])
        else:
            kernel, struct, known = KERNELS[name.literal_value]
            run(b, kernel, fields_of([field for field, _ in struct._fields_], known), *values[1:])
        return context.get_dummy_value()

    return nb.void(name, nb.intp, nb.intp, nb.intp), codegen


def _functions(number: int) -> tuple[Callable[[str], Any], Any]:
    """What makes the function that is compiled for a task, and the function of the task "region"."""

    # What is closed over is part of the key of numba's cache: the number is to be, while a kernel would get another key
    # in every process, and be compiled there again. So tasks are found by name. Functions of one name that different
    # processes keep there can be taken for each other, so the task's name is also part of its function's.
    def function_of(name):
        def task(address, thread, threads):
            if number != 0:
                emit_task(name, address, thread, threads)

        task.__qualname__ = f"{task.__qualname__}.{name}"
        return task

    def region(address):
        if number != 0:
            emit_task("region", address, 0, 1)

    return function_of, region


_function_of, _region = _functions(fingerprint())


compiled_functions: dict[str, Any] = {}


def prepare(names: Iterable[str]) -> None:
    """Compile those tasks, and what stores those tables, that this process has not compiled yet."""
    missing = [name for name in names if name not in compiled_functions]
    if missing:
        with Progress(missing) as progress:
            for name in missing:
                function, count = (_region, 1) if name == "region" else (_function_of(name), 3)
                compiled_functions[name] = compiled(nb.void(*[nb.intp] * count), function)
                progress.done(name)


def prepare_kernel(task: str, cell: Cell, size: int, pieces: int, rare: Sequence[str]) -> None:
    """Compile all that a kernel needs, so that what is left can be shown. See `frames.Kernel`."""
    matrix, seldom = [f"matrix{pieces}"] * (pieces > 0), [f"{kind}.{size}" for kind in rare]
    prepare([f"primitives{size}", *matrix, table_of(cell, size), *seldom, task])


def _compiled(name: str) -> Any:
    prepare([name])
    return compiled_functions[name]


def _addresses(name: str) -> dict[str, int]:
    addresses = (ctypes.c_int64 * len(tables[name]))()
    task(name)(ctypes.addressof(addresses), 0, 1)
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


@cache
def rare(size: int, kind: str) -> dict[str, int]:
    """The addresses of those primitives that few calls need, of a kind of `primitives.RARE`."""
    return _addresses(f"{kind}.{size}")


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
