"""What Numba's compiled code cannot say otherwise: calls by address, loads from an address, atomics."""

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from fastlstm.backends.numba.llvm.simd import I8, I32, I64, load, store


@intrinsic
def call(typingctx, address, *arguments):
    """Call a function of int64 arguments by address."""
    count = len(arguments)

    def codegen(context, b, signature, args):
        pointer = ir.FunctionType(ir.VoidType(), [I64] * count).as_pointer()
        b.call(b.inttoptr(args[0], pointer), [b.extract_value(args[1], k) for k in range(count)])
        return context.get_dummy_value()

    return types.void(types.intp, types.Tuple((types.intp,) * count)), codegen


@intrinsic
def call_int(typingctx, address):
    """Call ``int f(void)`` by address."""

    def codegen(context, b, signature, args):
        return b.sext(b.call(b.inttoptr(args[0], ir.FunctionType(I32, []).as_pointer()), []), I64)

    return types.intp(types.intp), codegen


def _getter(integer, extend):
    """What loads an integer of this type from an address, extended to 64 bits."""

    def get(typingctx, address):
        def codegen(context, b, signature, args):
            return extend(b, load(b, integer, args[0]), I64)

        return types.intp(types.intp), codegen

    return intrinsic(get)


get_byte = _getter(I8, ir.IRBuilder.zext)
get_int32, get_int64 = _getter(I32, ir.IRBuilder.sext), _getter(I64, ir.IRBuilder.sext)


@intrinsic
def set_int64(typingctx, address, value):
    """Store an int64 at an address."""

    def codegen(context, b, signature, args):
        store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def add_atomic(typingctx, address, value):
    """Add to the int64 at an address, visible to every thread after what was written before it;
    returns the new value.
    """

    def codegen(context, b, signature, args):
        return b.add(b.atomic_rmw("add", b.inttoptr(args[0], I64.as_pointer()), args[1], "acq_rel"), args[1])

    return types.intp(types.intp, types.intp), codegen


@intrinsic
def load_atomic(typingctx, address):
    """The int64 at an address, with all that was written before another thread stored it."""

    def codegen(context, b, signature, args):
        return b.load_atomic(b.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.intp(types.intp), codegen
