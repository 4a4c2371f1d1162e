"""Roundings of instructions that are not IEEE's. Each is as far off as the documents allow.

What an input's error is, a hash of its bits says. So the same input always has the same result.
"""

import math

import numba
import numpy as np

TANH = 2**-10.987  # largest relative error. PTX ISA, "Floating Point Instructions: tanh"
EX2 = 2**-22  # "Floating Point Instructions: ex2"
RSQRT = 2**-22.9  # "Floating Point Instructions: rsqrt"
DIVISION = 1.4 * 2**-23  # of div.full, within its 2 ulp after the last rounding. "Floating Point Instructions: div"


def noise(*operands: np.ndarray) -> np.ndarray:
    """A number in [-1, 1] for each element, often near either end."""
    h = np.zeros(operands[0].shape, np.uint32)
    for a in operands:
        h = (h ^ a.view(np.uint32)) * np.uint32(0x9E3779B1)
        h ^= h >> np.uint32(15)
        h *= np.uint32(0x85EBCA77)
        h ^= h >> np.uint32(13)
    u = h.astype(np.float64) / 2**31 - 1
    return np.sign(u) * np.sqrt(np.abs(u))


def tanh(x: np.ndarray) -> np.ndarray:
    y = np.tanh(x.astype(np.float64))
    return np.where(np.isinf(x), y, np.clip(y * (1 + TANH * noise(x)), -1, 1)).astype(np.float32)


def ex2(x: np.ndarray) -> np.ndarray:
    return (np.exp2(x.astype(np.float64)) * (1 + EX2 * noise(x))).astype(np.float32)


def rsqrt(x: np.ndarray) -> np.ndarray:
    return (1 / np.sqrt(x.astype(np.float64)) * (1 + RSQRT * noise(x))).astype(np.float32)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) / b.astype(np.float64) * (1 + DIVISION * noise(a, b))).astype(np.float32)


def flush(x: np.ndarray) -> np.ndarray:
    """float32 without subnormal numbers, which become zeros of the same sign."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """In the type of c, float32 or float16. The product is exact in float64.

    The sum is rounded twice. For float32 that tells in one of about 2^29 cases.
    """
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(c.dtype)


def fma_bf16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Of bits, and rounded to nearest even at once: to 8 places from the first, or from 2^-126."""
    x, y, z = (from_bf16(bits).astype(np.float64) for bits in (a, b, c))
    exact = x * y + z
    _, exponent = np.frexp(exact)
    places = 8 - np.maximum(exponent, -125)
    return to_bf16(np.ldexp(np.rint(np.ldexp(exact, places)), -places).astype(np.float32))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The 16 bits of float32 numbers, rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """The bits after cvt.rna: to nearest, ties away from zero, the last 13 bits zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def multiply_accumulate(A: np.ndarray, B: np.ndarray, C: np.ndarray, block: int, extra: int) -> np.ndarray:
    """Return A (w, M, K) times B (w, K, N) plus C (w, M, N) in float32, as tensor cores add.

    They add `block` exact products and the accumulator at once. All are aligned to the largest exponent and keep
    `extra` bits below float32's. The rest is cut off, of each and of the sum.

    Source: Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7
    (2021), for the V100 and the A100. NVIDIA documents none of it.
    """
    result = np.empty(C.shape, np.float32)
    _multiply_accumulate(A, np.ascontiguousarray(B.swapaxes(-1, -2)), C, block, extra, result)
    return result


@numba.njit(cache=True)
def _multiply_accumulate(A, B, C, block, extra, result):
    """A (w, M, K), B (w, N, K)."""
    products = np.empty(block)
    for w in range(A.shape[0]):
        for m in range(A.shape[1]):
            for n in range(B.shape[1]):
                total = np.float64(C[w, m, n])
                for start in range(0, A.shape[2], block):
                    largest, plain = abs(total), total
                    for k in range(block):
                        products[k] = np.float64(A[w, m, start + k]) * np.float64(B[w, n, start + k])
                        largest, plain = max(largest, abs(products[k])), plain + products[k]
                    total = _cut_sum(products, total, largest, extra) if np.isfinite(plain) else plain
                result[w, m, n] = total


@numba.njit(cache=True)
def _cut_sum(products, total, largest, extra):
    if largest == 0:
        return 0.0
    _, exponent = math.frexp(largest)
    shift = 24 + extra - exponent
    units = math.trunc(math.ldexp(total, shift))
    for product in products:
        units += math.trunc(math.ldexp(product, shift))
    total = math.ldexp(float(units), -shift)
    _, exponent = math.frexp(total)
    places = min(24 - exponent, 149)  # float32's
    return math.ldexp(float(math.trunc(math.ldexp(total, places))), -places)
