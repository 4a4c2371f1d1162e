"""The functions that a cell may call, on vectors. NaN comes out as NaN."""

from collections.abc import Callable
from math import inf, nan
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.simd import Vector, instruction

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
# log(2) in two parts, of which the first times an exponent is exact
LN2_32 = (float.fromhex("0x1.62e3p-1"), float.fromhex("0x1.2fefa4p-17"))
LN2_64 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))
# A sum with it has -N, plus the exponent's bias, in its last bits
MAGIC = {4: 1.5 * 2**23 + 127, 8: 1.5 * 2**52 + 1023}


def _exponential(
    x: Vector, limits: tuple[float, float], log2e: tuple[float, ...], q: tuple[float, ...]
) -> tuple[Vector, ...]:
    """Return ``a, b, f`` as above, and the sum that has -N in its last bits."""
    vtype = x.vtype
    x = x.clamp(*limits)
    shifted = x * -log2e[0] + MAGIC[vtype.size]
    f = x * log2e[0] + (shifted - MAGIC[vtype.size])
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
    return ir.Constant(ir.VectorType(x.vtype.integer, x.vtype.count), [value] * x.vtype.count)


def _power(x: Vector, exponent: ir.Value) -> Vector:
    """Return 2 to the power of the number in the last bits, from which the exponent's bias is subtracted."""
    b, mantissa = x.b, _integers(x, {4: 23, 8: 52}[x.vtype.size])
    return x._new(b.bitcast(b.shl(exponent, mantissa), x.vtype.type))


def _bits(x: Vector) -> ir.Value:
    return x.b.bitcast(x.value, ir.VectorType(x.vtype.integer, x.vtype.count))


def sigmoid(x: Vector) -> Vector:
    a, base, _, shifted = _exponential(x, *(SIGMOID32 if x.vtype.size == 4 else SIGMOID64))
    s = _power(x, _bits(shifted))
    return a / (s * base + a)


def tanh(x: Vector) -> Vector:
    a, base, f, shifted = _exponential(x, *(TANH32 if x.vtype.size == 4 else TANH64))
    s = _power(x, _bits(shifted))
    return ((1.0 - s) * base + f) / (s * base + a)  # with 1 - s, exact relative behaviour at zero


def exp(x: Vector) -> Vector:
    """Return e^x as a / b times two powers of 2: one alone reaches neither the largest nor the smallest results."""
    b, size = x.b, x.vtype.size
    a, base, _, shifted = _exponential(x, *(EXP32 if size == 4 else EXP64))
    bias = _integers(x, {4: 127, 8: 1023}[size])
    n = b.sub(_bits(x._new(x.vtype.splat(MAGIC[size]))), _bits(shifted))  # N
    half = b.ashr(n, _integers(x, 1))
    low, high = (_power(x, b.add(part, bias)) for part in (half, b.sub(n, half)))
    return a / base * low * high


def log_sigmoid(x: Vector) -> Vector:
    """Return min(x, 0) - log1p(e^-|x|), where log1p(y) = 2 atanh(y / (2 + y)) is a series: y is at most 1."""
    negative = x < 0.0
    y = exp(negative.where(x, -x))
    z = y / (y + 2.0)
    square, terms = x._new((z * z).value), 8 if x.vtype.size == 4 else 17
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


def sqrt(x: Vector) -> Vector:
    return x._new(instruction(x.b, f"llvm.sqrt.{x.vtype.suffix}", x.vtype.type, x.value))


def rsqrt(x: Vector) -> Vector:
    return 1.0 / sqrt(x)


def log(x: Vector) -> Vector:
    """Return n log(2) + log(1 + f) for x = 2^n (1 + f), 1 + f between the roots of 1/2 and 2. With s = f / (2 + f),
    log(1 + f) = 2 atanh(s) = f - f^2 / 2 + s (f^2 / 2 + r), r a series in s^2. f, the largest term, is added nearly
    last.
    """
    b, size = x.b, x.vtype.size
    mantissa, bias, terms, ln2 = (23, 127, 4, LN2_32) if size == 4 else (52, 1023, 10, LN2_64)
    is_tiny = x < 2.0 ** (1 - bias)  # then it may have no exponent of its own
    bits = _bits(is_tiny.where(x * 2.0**mantissa, x))
    root, one, magic = (_bits(x._new(x.vtype.splat(value))) for value in (0.5**0.5, 1.0, 1.5 * 2**mantissa))
    bits = b.add(bits, b.sub(one, root))  # so that the exponent changes at the root of 2
    exponent = b.sub(b.ashr(bits, _integers(x, mantissa)), _integers(x, bias))
    n = x._new(b.bitcast(b.add(exponent, magic), x.vtype.type)) - 1.5 * 2**mantissa
    n = n - is_tiny.where(float(mantissa), 0.0)
    rest = b.add(b.and_(bits, _integers(x, (1 << mantissa) - 1)), root)
    f = x._new(b.bitcast(rest, x.vtype.type)) - 1.0
    s = f / (f + 2.0)
    z, half = x._new((s * s).value), x._new((f * 0.5 * f).value)
    series: Any = 2.0 / (2 * terms + 1)
    for k in range(2 * terms - 1, 1, -2):
        series = z * series + 2.0 / k
    result = n * ln2[0] + (f - (half - (s * (z * series + half) + n * ln2[1])))
    special = (x >= 0.0).where(-inf, nan)
    return (x > 0.0).where((x < inf).where(result, x), special)


def fill(like: Vector, value: float) -> Vector:
    return like._new(like.vtype.splat(value))


ON_VECTORS: dict[str, Callable[..., Vector]] = {
    f.__name__: f
    for f in (sigmoid, tanh, exp, log, log_sigmoid, sqrt, rsqrt, relu, maximum, where, stop_gradient, fill)
}
