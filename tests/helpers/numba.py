"""What the tests of the Numba backend share: its kernels one by one, and interpreters of their own."""

import ctypes
import os
import sys

import llvmlite.binding as llvm
import torch
from llvmlite import ir

from fastlstm import cells
from fastlstm.backends.base import Layer
from fastlstm.backends.numba.host import tasks
from fastlstm.backends.numba.host.signature import signature_of
from fastlstm.backends.numba.host.sizes import lanes_of
from fastlstm.backends.numba.llvm import matrix, translate
from fastlstm.backends.numba.llvm.simd import I64, store
from tests.helpers import interpreter
from tests.helpers.layers import needs
from tests.helpers.threads import limits

needs_unit, needs_pieces = needs("numba-bf16"), needs("numba-bf16x6")  # products of bfloat16, and of float32 in pieces
PRECISIONS = ("numba-bf16", "numba-bf16x3", "numba-bf16x6")


def under(function, team=1, **values):
    """Call a function with other limits, on so many threads."""
    threads = torch.get_num_threads()
    with limits(**values):
        torch.set_num_threads(team)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)


def signature(T, B, I, H, dtype=torch.float32):
    """What the sizes of a layer's buffers depend on."""
    x, weights = torch.empty(T, B, I, dtype=dtype), (torch.empty(4 * H, K, dtype=dtype) for K in (I, H))
    layer = Layer(x, (*weights, None, None), (None, None), None, None, False, cells.lstm)
    return signature_of(layer, (), 0)


def primitive(name, pieces):
    arguments, _ = matrix.builders(pieces)[name]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(tasks.primitives(f"matrix{pieces}")[name])


def compiled(function, **fields):
    """A function ``f(a, x, y)`` of the kernels' Python, of a struct with these numbers, as Python's: it returns two."""
    module = ir.Module("test")
    task = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 4), "task")
    b = ir.IRBuilder(task.append_basic_block())
    struct, target, *numbers = task.args
    results = translate.run(b, function, translate.fields_of(list(fields)), struct, *numbers)
    for k in range(2):
        store(b, b.extract_value(results, k), b.add(target, I64(8 * k)))
    b.ret_void()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    start = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(engine.get_function_address("task"))
    values, returned = (ctypes.c_int64 * len(fields))(*fields.values()), (ctypes.c_int64 * 2)()

    def call(x, y, engine=engine):
        start(ctypes.addressof(values), ctypes.addressof(returned), x, y)
        return (*returned,)

    return call


def run(code, cwd=None, arguments=(), **environment):
    """Output of a fresh interpreter; anything but success fails the test with what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return interpreter.run(code, *arguments, cwd=cwd, environment=environment, check=True).stdout


ROWS = (*range(1, 40), 64, 65)


def largest_error(dtype, vectors, rows):
    """Of `rows` rows against float64; the row after them is to stay as it was."""
    width, K, size = lanes_of(dtype) * vectors, 9, dtype.itemsize
    table = tasks.primitives(f"primitives{size}")
    init, a, w = (torch.randn(n, m, dtype=dtype) for n, m in ((rows, width), (rows, K), (K, width)))
    out = torch.full((rows + 1, width), torch.nan, dtype=dtype)
    arguments = [rows, init.data_ptr(), width * size, out.data_ptr(), width * size, w.data_ptr()]
    arguments += [width * size, a.data_ptr(), K * size, size, K, 1, 0, 0, a.data_ptr(), 0, 0]
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(table[f"gemm{vectors}"])(*arguments)
    assert out[rows:].isnan().all()
    difference = out[:rows].double() - (init.double() + a.double() @ w.double())
    return torch.nan_to_num(difference.abs(), nan=torch.inf).max()
