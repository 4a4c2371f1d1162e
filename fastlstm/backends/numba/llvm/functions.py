"""The functions that a cell may call, on vectors. NaN comes out as NaN."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.simd import Vector

# sigmoid, tanh and exp from one form. With t = x L = N + f, |f| <= 1/2, and L = log2(e), for tanh twice that:
#   e^(t ln 2) = (b + f) / (2^-N b),  b = q0 - f/2 + q1 f^2 + q2 f^4 ..,
#   f / (e^(f ln 2) - 1) being -f/2 and an even function.
# So sigmoid = a / (a + s b) and tanh = (a - s b) / (a + s b), a = b + f, s = 2^-N: in range by construction,
# one division each. The limits of t keep s a power of 2, zero or infinity, which sigmoid reaches where it is to be 0.
# Coefficients: minimax fits; sigmoid and tanh are within 1.9e-7 and 1.3e-7 in float32, 2e-16 and 3e-16 in float64.
SIGMOID32 = ((-88.72, 87.0), (1.44269502,), (1.44270408, 0.0576181859))
TANH32 = ((-10.0, 10.0), (2.88539004,), (1.44269502, 0.0577620789, -0.000460556475))
_LOG2E = (float.fromhex("0x1.71547652b82fep+0"), float.fromhex("0x1.777d0ffda0d24p-56"))
_Q64 = tuple(
    float.fromhex(q)
    for q in (
        "0x1.71547652b82fep+0", "0x1.d9303fea2f7bbp-5", "-0x1.e50096dde992ap-12",
        "0x1.63144e989154dp-18", "-0x1.10f329f1e0b97p-24", "0x1.a40d209d03a1dp-31",
    )
)  # fmt: skip
SIGMOID64 = ((-709.78, 700.0), _LOG2E, _Q64)
TANH64 = ((-22.0, 22.0), tuple(2 * part for part in _LOG2E), _Q64)
# e^x, whose argument is not bounded by what comes out: log2(e) in two parts
EXP32 = ((-105.0, 105.0), (1.44269502162933349609375, 1.925963033500011e-08), TANH32[2])
EXP64 = ((-760.0, 760.0), _LOG2E, _Q64)
# A sum with it has -N, plus the exponent's bias, in its last bits
MAGIC = {4: 1.5 * 2**23 + 127, 8: 1.5 * 2**52 + 1023}


def _exponential(
    x: Vector, limits: tuple[float, float], log2e: tuple[float, ...], q: tuple[float, ...]
) -> tuple[Vector, ...]:
    """``a, b, f`` as above, and the sum that has -N in its last bits."""
    lanes = x.lanes
    x = x.clamp(*limits)
    shifted = x * -log2e[0] + MAGIC[lanes.size]
    f = x * log2e[0] + (shifted - MAGIC[lanes.size])
    for part in log2e[1:]:
        f = x * part + f
    if len(q) == 2:
        base = (f * q[1] + -0.5) * f + q[0]
    else:
        w = x._new((f * f).value)
        even: Vector | float = q[-1]
        for coefficient in q[-2:0:-1]:
            even = w * even + coefficient
        base = w * even + (f * -0.5 + q[0])
    return base + f, base, f, shifted


def _integers(x: Vector, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(x.lanes.integer, x.lanes.count), [value] * x.lanes.count)


def _power(x: Vector, exponent: ir.Value) -> Vector:
    """2 to the power of what is in the last bits, the exponent's bias added."""
    b, mantissa = x.b, _integers(x, {4: 23, 8: 52}[x.lanes.size])
    return x._new(b.bitcast(b.shl(exponent, mantissa), x.lanes.type))


def _bits(x: Vector) -> ir.Value:
    return x.b.bitcast(x.value, ir.VectorType(x.lanes.integer, x.lanes.count))


def sigmoid(x: Vector) -> Vector:
    a, base, _, shifted = _exponential(x, *(SIGMOID32 if x.lanes.size == 4 else SIGMOID64))
    s = _power(x, _bits(shifted))
    return a / (s * base + a)


def tanh(x: Vector) -> Vector:
    a, base, f, shifted = _exponential(x, *(TANH32 if x.lanes.size == 4 else TANH64))
    s = _power(x, _bits(shifted))
    return ((1.0 - s) * base + f) / (s * base + a)  # with 1 - s, exact relative behaviour at zero


def exp(x: Vector) -> Vector:
    """As a / b times two powers of 2, since one of them reaches neither the largest nor the smallest results."""
    b, size = x.b, x.lanes.size
    a, base, _, shifted = _exponential(x, *(EXP32 if size == 4 else EXP64))
    bias = _integers(x, {4: 127, 8: 1023}[size])
    n = b.sub(_bits(x._new(x.lanes.splat(MAGIC[size]))), _bits(shifted))  # N
    half = b.ashr(n, _integers(x, 1))
    low, high = (_power(x, b.add(part, bias)) for part in (half, b.sub(n, half)))
    return a / base * low * high


def log_sigmoid(x: Vector) -> Vector:
    """min(x, 0) - log1p(e^-|x|), where log1p(y) = 2 atanh(y / (2 + y)) is a series: y is at most 1."""
    negative = x < 0.0
    y = exp(negative.where(x, -x))
    z = y / (y + 2.0)
    square, terms = x._new((z * z).value), 8 if x.lanes.size == 4 else 17
    series: Any = 1.0 / (2 * terms - 1)
    for k in range(2 * terms - 3, 0, -2):
        series = square * series + 1.0 / k
    return negative.where(x, 0.0) + -(z * 2.0 * series)


def relu(x: Vector) -> Vector:
    return (x <= 0.0).where(0.0, x)


def maximum(a: Vector, b: Vector | float) -> Vector:
    larger = (a >= b).where(a, b)  # b where either is NaN
    return larger._new(a.b.select(a.b.fcmp_unordered("uno", a.value, a.value), a.value, larger.value))


def where(condition: Vector, a: Vector | float, b: Vector | float) -> Vector:
    return condition.where(a, b)


def stop_gradient(x: Vector) -> Vector:
    return x


def fill(like: Vector, value: float) -> Vector:
    return like._new(like.lanes.splat(value))


ON_VECTORS: dict[str, Callable[..., Vector]] = {
    f.__name__: f for f in (sigmoid, tanh, exp, log_sigmoid, relu, maximum, where, stop_gradient, fill)
}
