"""What the kernels' Python cannot say: calls by address, loads from an address, atomics. `emit` runs these functions
where a kernel calls them, and they emit instructions: `b` builds the kernel, and the arguments are its numbers.
"""

from llvmlite import ir

from fastlstm.backends.numba.llvm.simd import I8, I32, I64, load, store


def call(b: ir.IRBuilder, address: ir.Value, *arguments: ir.Value) -> None:
    """Call a function of int64 arguments by address."""
    pointer = ir.FunctionType(ir.VoidType(), [I64] * len(arguments)).as_pointer()
    b.call(b.inttoptr(address, pointer), arguments)


def call_int(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Call ``int f(void)`` by address."""
    return b.sext(b.call(b.inttoptr(address, ir.FunctionType(I32, []).as_pointer()), []), I64)


def get_byte(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.zext(load(b, I8, address), I64)


def get_int32(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.sext(load(b, I32, address), I64)


def get_int64(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return load(b, I64, address)


def set_int64(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    store(b, value, address)


def add_atomic(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    """Add to the int64 at an address, after all that was written before, and return the new value."""
    return b.add(b.atomic_rmw("add", b.inttoptr(address, I64.as_pointer()), value, "acq_rel"), value)


def load_atomic(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Load the int64 at an address, and see all that another thread wrote before it stored it."""
    return b.load_atomic(b.inttoptr(address, I64.as_pointer()), "acquire", 8)
