"""Vectors as explicit LLVM: registers of `VECTOR_BYTES`, and an arithmetic class whose operators emit instructions.

Gate arithmetic for a loop vectoriser cost more than the whole matrix product. Products are fused into the sums that
they stand in, in one fixed way, so a row's bits do not depend on its register tile.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, config, types


def machine_features() -> str:
    """Return LLVM's features of the processor, on 64-bit ARM with NEON, of which LLVM lists none on a Mac."""
    name, features = config.CPU_NAME, config.CPU_FEATURES  # type: ignore[attr-defined]
    if not (name or features):  # numba's own settings, which name a machine to compile for
        features = llvmlite.binding.get_host_cpu_features().flatten()
    is_arm = llvmlite.binding.get_process_triple().startswith(("aarch64", "arm64"))
    return ",".join(["+neon"] * is_arm + [features] * bool(features))


def _machine() -> tuple[int, int]:
    """Return the bytes of a vector, and the batch rows of a register tile with 4 vectors a row."""
    features = machine_features()
    if "+avx512f" in features:
        return 64, 6  # 32 registers: 24 accumulators
    if "+avx2" in features and "+fma" in features:
        return 32, 3  # 16 registers: 12 accumulators
    return 16, 6 if "+neon" in features else 3


VECTOR_BYTES, TILE_ROWS = _machine()
IS_NEON = "+neon" in machine_features()
I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))


def load(b: ir.IRBuilder, kind: ir.Type, address: ir.Value, align: int | None = None) -> ir.Value:
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: ir.Value, address: ir.Value, align: int | None = None) -> ir.Value:
    stored = b.store(value, b.inttoptr(address, value.type.as_pointer()))
    stored.align = align
    return stored


def instruction(b: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Emit the call of the LLVM intrinsic of a name, with a result type."""
    signature = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, signature, name), arguments)


def opaque(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return an integer of which LLVM knows nothing, so that it keeps it in a register."""
    return b.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], side_effect=False)


class VectorType:
    """A vector type: LLVM's types, and instructions. `size`: bytes of an element. `count`: the number of lanes."""

    multiply_add = "fmuladd"  # not fma: without a fused instruction that is a library call

    def __init__(self, scalar: types.Float) -> None:
        self.size = scalar.bitwidth // 8
        self.count = VECTOR_BYTES // self.size
        self.scalar = ir.FloatType() if self.size == 4 else ir.DoubleType()
        self.integer = ir.IntType(8 * self.size)
        self.type = ir.VectorType(self.scalar, self.count)
        self.suffix = f"v{self.count}f{8 * self.size}"

    def splat(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [value] * self.count)

    def load(self, b: ir.IRBuilder, address: ir.Value) -> ir.Value:
        return load(b, self.type, address, self.size)

    def load_some(self, b: ir.IRBuilder, n: int, address: ir.Value) -> ir.Value:
        """Load n elements, which may be fewer than a vector has."""
        return load(b, ir.VectorType(self.scalar, n), address, self.size)

    def store(self, b: ir.IRBuilder, value: ir.Value, address: ir.Value, past_caches: int = 0) -> None:
        """Store a vector, past the caches if `past_caches`, the alignment of whole vectors, is not 0."""
        stored = store(b, value, address, past_caches or self.size)
        if past_caches:
            stored.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

    def broadcast(self, b: ir.IRBuilder, address: ir.Value) -> ir.Value:
        """Load a number into every lane."""
        return self.broadcast_value(b, load(b, self.scalar, address, self.size))

    def broadcast_value(self, b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
        """Return a number, of any type, in every lane."""
        undefined = ir.Constant(ir.VectorType(scalar.type, self.count), ir.Undefined)
        zeros = ir.Constant(ir.VectorType(I32, self.count), [0] * self.count)
        return b.shuffle_vector(b.insert_element(undefined, scalar, I32(0)), undefined, zeros)

    def lane(self, b: ir.IRBuilder, value: ir.Value, k: int) -> ir.Value:
        """Return lane k in every lane."""
        return b.shuffle_vector(value, value, ir.Constant(ir.VectorType(I32, self.count), [k] * self.count))

    def fma(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        return instruction(b, f"llvm.{self.multiply_add}.{self.suffix}", self.type, x, y, z)

    def total(self, b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        """Return the sum of the lanes, in every lane."""
        half = self.count // 2
        while half:
            order = ir.Constant(ir.VectorType(I32, self.count), [k ^ half for k in range(self.count)])
            value, half = b.fadd(value, b.shuffle_vector(value, value, order)), half // 2
        return value

    def first_lanes(self, b: ir.IRBuilder, count: ir.Value) -> ir.Value:
        """Return a mask of the first `count` lanes."""
        numbers = ir.Constant(ir.VectorType(I64, self.count), list(range(self.count)))
        return b.icmp_signed("<", numbers, self.broadcast_value(b, count))


class Vector:
    """A value whose operators emit LLVM. A product waits until it is used, so that a sum can fuse it."""

    def __init__(self, b: ir.IRBuilder, vtype: VectorType, value: ir.Value | None, factors: Any = None) -> None:
        self.b, self.vtype, self._value, self.factors = b, vtype, value, factors

    @property
    def value(self) -> ir.Value:
        if self._value is None:
            self._value = self.b.fmul(*self.factors)
        return self._value

    def _raw(self, other: Vector | float) -> ir.Value:
        return other.value if isinstance(other, Vector) else self.vtype.splat(other)

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self.b, self.vtype, value)

    def __mul__(self, other: Vector | float) -> Vector:
        return Vector(self.b, self.vtype, None, (self.value, self._raw(other)))

    def __add__(self, other: Vector | float) -> Vector:
        if self.factors and self._value is None:
            x, y = self.factors
            return self._new(self.vtype.fma(self.b, x, y, self._raw(other)))
        if isinstance(other, Vector) and other.factors and other._value is None:
            x, y = other.factors
            return self._new(self.vtype.fma(self.b, x, y, self.value))
        return self._new(self.b.fadd(self.value, self._raw(other)))

    def __sub__(self, other: Vector | float) -> Vector:
        return self._new(self.b.fsub(self.value, self._raw(other)))

    def __rsub__(self, other: float) -> Vector:
        if self.factors and self._value is None:
            x, y = self.factors
            return self._new(self.vtype.fma(self.b, self.b.fneg(x), y, self.vtype.splat(other)))
        return self._new(self.b.fsub(self.vtype.splat(other), self.value))

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._new(self.b.fdiv(self.value, self._raw(other)))

    def __rtruediv__(self, other: float) -> Vector:
        return self._new(self.b.fdiv(self.vtype.splat(other), self.value))

    def __neg__(self) -> Vector:
        if self.factors and self._value is None:
            x, y = self.factors
            return Vector(self.b, self.vtype, None, (self.b.fneg(x), y))
        return self._new(self.b.fneg(self.value))

    def _compared(self, order: str, other: Vector | float) -> Vector:
        return self._new(self.b.fcmp_ordered(order, self.value, self._raw(other)))  # false where either is NaN

    __gt__, __ge__ = partialmethod(_compared, ">"), partialmethod(_compared, ">=")
    __lt__, __le__ = partialmethod(_compared, "<"), partialmethod(_compared, "<=")

    def where(self, a: Vector | float, b: Vector | float) -> Vector:
        """Return `a` in the lanes of this mask, and `b` in the others."""
        return self._new(self.b.select(self.value, self._raw(a), self._raw(b)))

    __radd__, __rmul__ = __add__, __mul__

    def clamp(self, low: float, high: float) -> Vector:
        """Limit to [low, high]. NaN stays NaN: minnum and maxnum would swallow it."""
        b, x, lowest, highest = self.b, self.value, self.vtype.splat(low), self.vtype.splat(high)
        if IS_NEON:  # an instruction each, for which x86-64 would need four
            for name, limit in (("minimum", highest), ("maximum", lowest)):
                x = instruction(b, f"llvm.{name}.{self.vtype.suffix}", x.type, x, limit)
            return self._new(x)
        for order, limit in (("<", highest), (">", lowest)):
            x = b.select(b.fcmp_ordered(order, limit, x), limit, x)
        return self._new(x)
