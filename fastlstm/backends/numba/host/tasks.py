"""The compiled kernels: C functions by address, and the threads that run them."""

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
from fastlstm.backends.numba.host import kernel_files
from fastlstm.backends.numba.host.arguments import (
    TAILS,
    BackwardArguments,
    BothArguments,
    ForwardArguments,
    RegionArguments,
    StackArguments,
)
from fastlstm.backends.numba.host.compiling import Progress, compiled
from fastlstm.backends.numba.host.interruptions import turns, uninterrupted
from fastlstm.backends.numba.kernels.backward import backward, backward_matrix
from fastlstm.backends.numba.kernels.forward import forward, forward_matrix
from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.llvm import cells as cell_functions
from fastlstm.backends.numba.llvm.intrinsics import call, call_int
from fastlstm.backends.numba.llvm.loops import store_addresses, tables
from fastlstm.backends.numba.llvm.simd import VectorType
from fastlstm.backends.numba.llvm.translate import fields_of, run
from fastlstm.cells.spec import Cell

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


def stack(a, thread, threads):
    """Run this thread's layers of a stack, neighbours: other cores' caches fetch ahead, and would exchange lines."""
    for buffers in range(thread, a.buffer_sets, threads):
        for k in range(share(a.count, buffers, a.buffer_sets), share(a.count, buffers + 1, a.buffer_sets)):
            call(a.task, a.first + k * a.struct_bytes, 0, 1)


def both(a, thread, threads):
    """Run two calls, each on half of the threads, or one after the other on the only thread."""
    each = max(1, threads // 2)
    for k in range(thread // each, 2, max(1, threads // each)):
        call(a.task, a.first + k * a.struct_bytes, thread % each, each)


def region(a, thread, threads):
    """Run a task in a thread of an OpenMP region."""
    call(a.task, a.arguments, call_int(a.get_thread_number), call_int(a.get_thread_count))


# The known fields of cells that take no means in layers of one head: each has a value, or that of another field. With
# them the loops over phases and heads are compiled away.
PLAIN: dict[str, int | str] = {
    "phases": 1, "heads": 1, "head": "H", "span": "H", "terms": "preacts", "products": 0, "product_groups": 0,
    "splits_rows": 0,
}  # fmt: skip
_PLAIN_BACKWARD = PLAIN | {"reach": "panels"}
KERNELS: dict[str, tuple[Any, Any, dict[str, int | str]]] = {
    "forward": (forward, ForwardArguments, PLAIN),
    "backward": (backward, BackwardArguments, _PLAIN_BACKWARD),
    "forward_across": (forward, ForwardArguments, {}),
    "backward_across": (backward, BackwardArguments, {}),
    "forward_matrix": (forward_matrix, ForwardArguments, PLAIN),
    "backward_matrix": (backward_matrix, BackwardArguments, _PLAIN_BACKWARD),
    "forward_matrix_across": (forward_matrix, ForwardArguments, {}),
    "backward_matrix_across": (backward_matrix, BackwardArguments, {}),
    "stack": (stack, StackArguments, {}),
    "both": (both, BothArguments, {}),
    "region": (region, RegionArguments, {}),
}


@intrinsic(prefer_literal=True)
def emit_task(typingctx, name, address, thread, threads):
    """Emit a task, whose name is a constant: run a kernel on the struct at an address, or store a table there."""

    def codegen(context, b, signature, values):
        if name.literal_value in tables:
            store_addresses(b, name.literal_value, values[1])
        else:
            kernel, struct, known = KERNELS[name.literal_value]
            run(b, kernel, fields_of([field for field, _ in struct._fields_], known), *values[1:])
        return context.get_dummy_value()

    return nb.void(name, nb.intp, nb.intp, nb.intp), codegen


def _to_compile(name: str) -> tuple[Any, Callable[..., None]]:
    """Return the signature and the function to compile for a task or a table of this name."""

    def task(address, thread, threads):
        emit_task(name, address, thread, threads)

    def region(address):
        emit_task("region", address, 0, 1)

    function, count = (region, 1) if name == "region" else (task, 3)
    return nb.void(*[nb.intp] * count), function


compiled_functions: dict[str, Any] = {}


def prepare(names: Sequence[str]) -> None:
    """Load or compile the tasks and tables of these names that this process does not have yet."""
    if all(name in compiled_functions for name in names):
        return
    with turns:  # of threads that want the same kernel one compiles it
        missing = load(names)
        with Progress(missing) as progress:
            for name in missing:
                compile_and_store(name)
                progress.done(name)


def load(names: Iterable[str]) -> list[str]:
    """Load those of the tasks and tables that this process does not have yet. Return the names of which no file is."""
    with uninterrupted():
        for name in names:
            if name not in compiled_functions and (kernel := kernel_files.load(name)) is not None:
                compiled_functions[name] = kernel
        return [name for name in names if name not in compiled_functions]


def compile_and_store(name: str) -> None:
    """Compile a task or a table, and write it to its file."""
    with uninterrupted():
        compiled_functions[name] = kernel_files.store(name, compiled(*_to_compile(name)))


def prepare_kernel(task: str, cell: Cell, size: int, components: int, rare: Sequence[str]) -> dict[str, int]:
    """Compile all that a kernel needs, see `frames.Kernel`, at once. Return the fields of its primitives."""
    matrix, rare_tables = [f"matrix{components}"] * (components > 0), [f"{kind}.{size}" for kind in rare]
    names = [f"primitives{size}", *matrix, table_of(cell, size), *rare_tables]
    prepare([*names, task])
    return {field: address for name in names for field, address in primitives(name).items()}


def _compiled(name: str) -> Any:
    prepare([name])
    return compiled_functions[name]


@cache
def primitives(name: str) -> dict[str, int]:
    """Return the addresses of the primitives of a table by their fields."""
    addresses = (ctypes.c_int64 * len(tables[name]))()
    task(name)(ctypes.addressof(addresses), 0, 1)
    return dict(zip(tables[name], addresses))


def table_of(cell: Cell, size: int) -> str:
    """Return the name of a cell's table of primitives, with a digest of their source, for elements of `size` bytes."""
    functions = cell_functions.functions_of(cell)
    digest = hashlib.sha256(functions.source.encode()).hexdigest()[:14]
    name = f"cell{size}.{digest}"
    if name not in tables:
        tables[name] = cell_functions.builders(VectorType(nb.float32 if size == 4 else nb.float64), functions)
    return name


@cache
def task(name: str) -> Any:
    """Return the C function of a task, which ctypes calls without the interpreter lock."""
    return _TASK(_compiled(name).address)


_submitting = threading.Lock()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="fastlstm")


@cache
def relax() -> int:
    """Return the address of sched_yield, which a waiting thread calls, or 0."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


def bind(name: str, arguments: ctypes.Structure, threads: int) -> Callable[[], object]:
    """Return a function that runs a task. The caller keeps `arguments` alive. One thread is a plain call."""
    function, address = task(name), ctypes.addressof(arguments)
    if threads == 1:
        return partial(function, *map(ctypes.c_int64, (address, 0, 1)))  # ctypes would convert ints in each call
    openmp = cpu.openmp()
    if openmp is None:
        return partial(_run_in_pool, function, address, threads)
    prepare(("region", "both"))  # the second, which few calls take, so that warming up compiles it as well
    parallel, get_thread_number, get_thread_count = openmp
    data = RegionArguments(_compiled(name).address, address, get_thread_number, get_thread_count)
    return partial(parallel, _compiled("region").address, ctypes.byref(data), threads, 0)  # which keeps the data alive


def bind_both(frame: Any, other: Any) -> tuple[Callable[[], object], ctypes.Structure]:
    """Return a function that runs two frames side by side, and its arguments. Both and the frames have to live on."""
    first, second = ctypes.addressof(frame.arguments), ctypes.addressof(other.arguments)
    arguments = BothArguments(_compiled(frame.task).address, first, second - first)
    return bind("both", arguments, 2 * frame.threads), arguments


def _run_in_pool(function: Any, address: int, threads: int) -> None:
    with _submitting:  # all threads of a run are queued at once: two runs that wait for threads would never end
        others = [_pool(threads).submit(function, address, k, threads) for k in range(1, threads)]
    function(address, 0, threads)
    for other in others:
        other.result()


def run_stack(
    name: str, arguments: ctypes.Structure, stack_size: int, layer_strides: dict[str, int],
    buffer_strides: dict[str, int], buffer_sets: int,
) -> None:  # fmt: skip
    """Run a task for each layer of a stack, each on one thread, `buffer_sets` at a time. `arguments` are those of layer
    0; in layer k addresses but 0 are larger by k times their `layer_strides`, and by `buffer_strides` for its set.
    """
    first = np.frombuffer(bytes(arguments), np.int64)
    strides = np.zeros((2, len(first)), np.int64)
    for target, by_field in zip(strides, (layer_strides, buffer_strides)):
        for field, stride in by_field.items():
            target[getattr(type(arguments), field).offset // 8] = stride
    layer = np.arange(stack_size)
    multipliers = np.stack((layer, ((layer + 1) * buffer_sets - 1) // stack_size), axis=1)
    structs = first + multipliers @ strides * (first != 0)
    for field in TAILS:  # each struct has records of its own, at the same offset
        offset = getattr(arguments, field) - ctypes.addressof(arguments)
        structs[:, getattr(type(arguments), field).offset // 8] = structs.ctypes.data + layer * first.nbytes + offset
    stack = StackArguments(_compiled(name).address, structs.ctypes.data, structs.strides[0], stack_size, buffer_sets)
    bind("stack", stack, buffer_sets)()
