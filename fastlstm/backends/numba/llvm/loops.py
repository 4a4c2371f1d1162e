"""What the primitives are built from: loops with values in registers, and functions of integers."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.simd import I64, store

Builder = Callable[..., None]
Builders = dict[str, tuple[int, Builder]]  # of each function how many arguments it takes, and what builds it
tables: dict[str, Builders] = {}  # what `store_addresses` knows by name


def counted(b: ir.IRBuilder, count: ir.Value, carried: list[ir.Value], body: Any) -> list[ir.Value]:
    """``for _ in range(count): carried = body(*carried)``, the values in registers."""
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


def tile_sums(rows: int, vecs: int, of_row: Any, of_vector: Any, add: Any, sums: list[Any]) -> list[Any]:
    """The sums of `rows` rows by `vecs` vectors, to each of which `add` adds what belongs to its row and its vector.
    The shorter side stays in registers, the longer one comes one at a time: no registers are left for more.
    """
    new, by_row = list(sums), rows > vecs
    held = [of_vector(n) for n in range(vecs)] if by_row else [of_row(m) for m in range(rows)]
    for k in range(max(rows, vecs)):
        one = of_row(k) if by_row else of_vector(k)
        for j, other in enumerate(held):
            at = k * vecs + j if by_row else j * vecs + k
            new[at] = add(new[at], one, other) if by_row else add(new[at], other, one)
    return new


def at_most(b: ir.IRBuilder, x: ir.Value, limit: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, limit), x, limit)


def offsets(b: ir.IRBuilder, stride: ir.Value, count: int) -> list[ir.Value]:
    return [b.mul(stride, I64(m)) for m in range(count)]


def function(module: ir.Module, name: str, arguments: int, body: Builder) -> ir.Function:
    """A function of integers in this module, built by ``body(builder, *arguments)`` when first asked for."""
    found = module.globals.get(name)
    if found is None:
        found = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
        found.linkage = "internal"
        found.attributes.add("noinline")
        b = ir.IRBuilder(found.append_basic_block("entry"))
        body(b, *found.args)
        b.ret_void()
    return found


def store_addresses(b: ir.IRBuilder, name: str, target: ir.Value) -> None:
    """Write the addresses of the functions of a table to an array of int64."""
    for k, (each, (arguments, builder)) in enumerate(tables[name].items()):
        found = function(b.module, f"fastlstm.{name}.{each}", arguments, builder)
        store(b, b.ptrtoint(found, I64), b.add(target, I64(8 * k)))
