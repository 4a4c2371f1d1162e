"""Basic parts of the primitives: loops with values in registers, and functions of integers."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.simd import I64, store

Builder = Callable[..., None]
Builders = dict[str, tuple[int, Builder]]  # for each function's name the number of its arguments, and its builder
tables: dict[str, Builders] = {}  # the tables of `store_addresses` by name


def for_loop(b: ir.IRBuilder, count: ir.Value, carried: list[ir.Value], body: Any) -> list[ir.Value]:
    """Emit ``for _ in range(count): carried = body(*carried)``, with the values in registers, and return them."""
    before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed(">", count, I64(0)), loop, after)
    b.position_at_end(loop)
    k = b.phi(I64)
    phis = [b.phi(value.type) for value in carried]
    new = body(*phis)
    k_next = b.add(k, I64(1))
    latch = b.block
    b.cbranch(b.icmp_signed("<", k_next, count), loop, after)
    for phi, start, value in zip([k, *phis], [I64(0), *carried], [k_next, *new]):
        phi.add_incoming(start, before)
        phi.add_incoming(value, latch)
    b.position_at_end(after)
    results = []
    for start, value in zip(carried, new):
        result = b.phi(value.type)
        result.add_incoming(start, before)
        result.add_incoming(value, latch)
        results.append(result)
    return results


def update_tile(rows: int, vecs: int, row_value: Any, vector: Any, add: Any, sums: list[Any]) -> list[Any]:
    """Return the sums of a register tile of `rows` by `vecs` vectors, after `add(total, row_value, vector)` for each.
    The values of the longer side come one at a time, since no registers are left for more.
    """
    new, by_row = list(sums), rows > vecs
    values = [vector(n) for n in range(vecs)] if by_row else [row_value(m) for m in range(rows)]
    for k in range(max(rows, vecs)):
        one = row_value(k) if by_row else vector(k)
        for j, other in enumerate(values):
            n = k * vecs + j if by_row else j * vecs + k
            new[n] = add(new[n], one, other) if by_row else add(new[n], other, one)
    return new


def at_most(b: ir.IRBuilder, x: ir.Value, limit: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, limit), x, limit)


def offsets(b: ir.IRBuilder, stride: ir.Value, count: int) -> list[ir.Value]:
    """Return the offsets of `count` rows."""
    return [b.mul(stride, I64(m)) for m in range(count)]


def function_named(module: ir.Module, name: str, arguments: int, body: Builder) -> ir.Function:
    """Return the function of a name in this module. The first call builds it by ``body(builder, *arguments)``."""
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
        function.linkage = "internal"
        function.attributes.add("noinline")
        b = ir.IRBuilder(function.append_basic_block("entry"))
        body(b, *function.args)
        b.ret_void()
    return function


def store_addresses(b: ir.IRBuilder, name: str, target: ir.Value) -> None:
    """Store the addresses of the functions of a table in an array of int64 at `target`."""
    for k, (each, (arguments, builder)) in enumerate(tables[name].items()):
        function = function_named(b.module, f"fastlstm.{name}.{each}", arguments, builder)
        store(b, b.ptrtoint(function, I64), b.add(target, I64(8 * k)))
