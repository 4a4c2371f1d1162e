"""Vectors as explicit LLVM: registers of `VECTOR_BYTES`, an arithmetic class whose operators emit instructions,
sigmoid and tanh.

Nothing is left to a loop vectoriser: the same gate arithmetic written as a loop cost more than the whole matrix
product. Products are fused into the sums they stand in, in one fixed way, so a row's bits do not depend on the tile it
is computed in.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, config, types

from fastlstm import cell


def machine_features() -> str:
    name, features = config.CPU_NAME, config.CPU_FEATURES  # type: ignore[attr-defined]
    if name or features:  # numba compiles for the machine these name
        return features or ""
    return llvmlite.binding.get_host_cpu_features().flatten()


def _machine() -> tuple[int, int]:
    """Bytes of a vector, and batch rows of a tile: 4 vectors a row in accumulators, with room for the operands."""
    features = machine_features()
    if "+avx512f" in features:
        return 64, 6  # 32 registers: 24 accumulators
    if "+avx2" in features and "+fma" in features:
        return 32, 3  # 16 registers: 12 accumulators
    if "+neon" in features:
        return 16, 6
    return 16, 3


VECTOR_BYTES, TILE_ROWS = _machine()
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


class Lanes:
    """Vectors of one element type: their LLVM types and the instructions a kernel needs."""

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
        value = b.load(b.inttoptr(address, self.type.as_pointer()))
        value.align = self.size
        return value

    def store(self, b: ir.IRBuilder, value: ir.Value, address: ir.Value, past_caches: int = 0) -> None:
        """`past_caches`: a whole vector's alignment, for a store that leaves the caches to others."""
        stored = b.store(value, b.inttoptr(address, self.type.as_pointer()))
        stored.align = past_caches or self.size
        if past_caches:
            stored.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

    def broadcast(self, b: ir.IRBuilder, address: ir.Value) -> ir.Value:
        scalar = b.load(b.inttoptr(address, self.scalar.as_pointer()))
        scalar.align = self.size
        return self.wide(b, scalar)

    def wide(self, b: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
        undefined = ir.Constant(ir.VectorType(scalar.type, self.count), ir.Undefined)
        zeros = ir.Constant(ir.VectorType(I32, self.count), [0] * self.count)
        return b.shuffle_vector(b.insert_element(undefined, scalar, I32(0)), undefined, zeros)

    def fma(self, b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        # fmuladd, not fma: without a fused instruction the latter is a library call. VectorType has no intrinsic_name
        signature = ir.FunctionType(self.type, [self.type] * 3)
        return b.call(cgutils.get_or_insert_function(b.module, signature, f"llvm.fmuladd.{self.suffix}"), [x, y, z])

    def first(self, b: ir.IRBuilder, count: ir.Value) -> ir.Value:
        """A mask of the first `count` lanes."""
        numbers = ir.Constant(ir.VectorType(I64, self.count), list(range(self.count)))
        return b.icmp_signed("<", numbers, self.wide(b, count))


class Vector:
    """A value whose operators emit LLVM. A product stays open until it is used, so that a sum can fuse it."""

    def __init__(self, b: ir.IRBuilder, lanes: Lanes, value: ir.Value | None, factors: Any = None) -> None:
        self.b, self.lanes, self._value, self.factors = b, lanes, value, factors

    @property
    def value(self) -> ir.Value:
        if self._value is None:
            self._value = self.b.fmul(*self.factors)
        return self._value

    def _raw(self, other: Vector | float) -> ir.Value:
        return other.value if isinstance(other, Vector) else self.lanes.splat(other)

    def _new(self, value: ir.Value) -> Vector:
        return Vector(self.b, self.lanes, value)

    def __mul__(self, other: Vector | float) -> Vector:
        return Vector(self.b, self.lanes, None, (self.value, self._raw(other)))

    def __add__(self, other: Vector | float) -> Vector:
        if self.factors and self._value is None:
            x, y = self.factors
            return self._new(self.lanes.fma(self.b, x, y, self._raw(other)))
        if isinstance(other, Vector) and other.factors and other._value is None:
            x, y = other.factors
            return self._new(self.lanes.fma(self.b, x, y, self.value))
        return self._new(self.b.fadd(self.value, self._raw(other)))

    def __sub__(self, other: Vector | float) -> Vector:
        return self._new(self.b.fsub(self.value, self._raw(other)))

    def __rsub__(self, other: float) -> Vector:
        if self.factors and self._value is None:
            x, y = self.factors
            return self._new(self.lanes.fma(self.b, self.b.fneg(x), y, self.lanes.splat(other)))
        return self._new(self.b.fsub(self.lanes.splat(other), self.value))

    def __truediv__(self, other: Vector | float) -> Vector:
        return self._new(self.b.fdiv(self.value, self._raw(other)))

    __radd__, __rmul__ = __add__, __mul__

    def clamp(self, low: float, high: float) -> Vector:
        """Within [low, high]; NaN stays NaN,
        since a comparison with it is false (minnum and maxnum would swallow it).
        """
        b, x = self.b, self.value
        for order, bound in (("<", high), (">", low)):
            limit = self.lanes.splat(bound)
            x = b.select(b.fcmp_ordered(order, limit, x), limit, x)
        return self._new(x)


# sigmoid and tanh from one form. With t = x L = N + f, |f| <= 1/2, and L = log2(e), for tanh twice that:
#   e^(t ln 2) = (b + f) / (2^-N b),  b = q0 - f/2 + q1 f^2 + q2 f^4 ..,
#   f / (e^(f ln 2) - 1) being -f/2 and an even function.
# So sigmoid = a / (a + s b) and tanh = (a - s b) / (a + s b), a = b + f, s = 2^-N: in range by construction,
# one division each.
# Coefficients: minimax fits; sigmoid and tanh are within 1.9e-7 and 1.3e-7 in float32, 2e-16 and 3e-16 in float64.
SIGMOID32 = (87.0, (1.44269502,), (1.44270408, 0.0576181859))
TANH32 = (10.0, (2.88539004,), (1.44269502, 0.0577620789, -0.000460556475))
_LOG2E = (float.fromhex("0x1.71547652b82fep+0"), float.fromhex("0x1.777d0ffda0d24p-56"))
_Q64 = tuple(
    float.fromhex(q)
    for q in (
        "0x1.71547652b82fep+0", "0x1.d9303fea2f7bbp-5", "-0x1.e50096dde992ap-12",
        "0x1.63144e989154dp-18", "-0x1.10f329f1e0b97p-24", "0x1.a40d209d03a1dp-31",
    )
)  # fmt: skip
SIGMOID64 = (700.0, _LOG2E, _Q64)
TANH64 = (22.0, tuple(2 * part for part in _LOG2E), _Q64)
# A sum with it has -N, plus the exponent's bias, in its last bits
MAGIC = {4: 1.5 * 2**23 + 127, 8: 1.5 * 2**52 + 1023}


def _exponential(x: Vector, limit: float, log2e: tuple[float, ...], q: tuple[float, ...]) -> tuple[Vector, ...]:
    """``a, b, f, s`` as above."""
    b, lanes = x.b, x.lanes
    x = x.clamp(-limit, limit)
    shifted = x * -log2e[0] + MAGIC[lanes.size]
    f = x * log2e[0] + (shifted - MAGIC[lanes.size])
    for part in log2e[1:]:
        f = x * part + f
    integers = ir.VectorType(lanes.integer, lanes.count)
    mantissa = ir.Constant(integers, [{4: 23, 8: 52}[lanes.size]] * lanes.count)
    s = x._new(b.bitcast(b.shl(b.bitcast(shifted.value, integers), mantissa), lanes.type))
    if len(q) == 2:
        base = (f * q[1] + -0.5) * f + q[0]
    else:
        w = x._new((f * f).value)
        even: Vector | float = q[-1]
        for coefficient in q[-2:0:-1]:
            even = w * even + coefficient
        base = w * even + (f * -0.5 + q[0])
    return base + f, base, f, s


def sigmoid(x: Vector) -> Vector:
    a, base, _, s = _exponential(x, *(SIGMOID32 if x.lanes.size == 4 else SIGMOID64))
    return a / (s * base + a)


def tanh(x: Vector) -> Vector:
    a, base, f, s = _exponential(x, *(TANH32 if x.lanes.size == 4 else TANH64))
    return ((1.0 - s) * base + f) / (s * base + a)  # with 1 - s, exact relative behaviour at zero


def cell_functions() -> tuple[Any, Any]:
    """`cell.cell_forward` and `cell.cell_backward` on vectors."""
    names = {"sigmoid": sigmoid, "tanh": tanh}
    return cell.bind(cell.cell_forward, **names), cell.bind(cell.cell_backward, **names)
