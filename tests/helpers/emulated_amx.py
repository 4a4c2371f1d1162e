"""A plugin of pytest that gives a processor without AMX its instructions for products of bfloat16, emulated in C.

Kernels call a function in place of each instruction. So `pytest -p tests.helpers.emulated_amx` runs any test on tiles
and on numbers of components that the processor itself does not have. NUMBA_CACHE_DIR must name a folder for it alone:
these kernels run nowhere else.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import llvmlite.binding as llvm
from llvmlite import ir

from fastlstm.backends.numba.llvm import amx, matrix
from fastlstm.backends.numba.llvm.loops import tables
from fastlstm.backends.numba.llvm.simd import I64

INSTRUCTIONS = ("ldtilecfg", "tilerelease", "tileloadd64", "tilestored64", "tdpbf16ps")


def compiled():
    """The emulation, as a library for this processor."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "emulated_amx.so")
        flags = "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([os.environ.get("CC", "cc"), *flags, source, "-o", target], check=True)
        return ctypes.CDLL(str(target))


def call(b, name, *args):
    """Emit a call of the emulation in place of an instruction."""
    numbers = []
    for a in args:
        is_pointer = isinstance(a.type, ir.PointerType)
        numbers.append(b.ptrtoint(a, I64) if is_pointer else a if a.type == I64 else b.zext(a, I64))
    function = b.module.globals.get(f"amx_{name}")
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(ir.VoidType(), [I64] * len(args)), f"amx_{name}")
    b.call(function, numbers)


library = compiled()
for name in INSTRUCTIONS:
    llvm.add_symbol(f"amx_{name}", ctypes.cast(library[f"amx_{name}"], ctypes.c_void_p).value)
amx._call, amx.max_components, matrix.bf16_module = call, lambda: 3, lambda: amx
tables.update({f"matrix{components}": matrix.builders(components) for components in amx.PRODUCTS})
