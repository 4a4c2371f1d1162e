"""Instructions on one thread's registers.

PTX ISA, "Integer Arithmetic", "Floating Point", "Comparison and Selection", "Half Precision Comparison", "Logic and
Shift" and "Data Movement: mov".
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx.emulator import numerics
from tests.ptx.emulator.operands import BITS, Active, Run, Unsupported, pure, source
from tests.ptx.emulator.parse import Instruction, Operand, Register

WIDER = {"s32": np.int64, "u32": np.uint64, "s16": np.int32, "u16": np.uint32}
SAME = ""  # an operand of the instruction's own type


def build(ins: Instruction, n: int) -> Run:
    base, kind = ins.parts[0], ins.parts[-1]
    maker = {"mov": _mov, "setp": _setp, "selp": _selp, "mad": _mad, "mul": _mul}.get(base)
    if maker:
        return maker(ins, n)
    if ins.opcode in ("fma.rn.ftz.f32", "rsqrt.approx.ftz.f32"):
        kinds, function = OPERATIONS[base]
        return pure(ins, n, kind, [kind] * len(kinds), _flushed(function))
    if base not in OPERATIONS or any(part in ("ftz", "sat", "cc") for part in ins.parts):
        raise Unsupported(ins.text)
    kinds, function = OPERATIONS[base]
    if ins.parts[1:3] == ["rn", "f32"] and kind in ("bf16", "f16"):  # the last operand is of float32
        widen = numerics.from_bf16 if kind == "bf16" else np.float32
        if base == "fma":  # the product of two of 16 bits is exact
            return pure(ins, n, "f32", [kind, kind, "f32"], lambda a, b, c: numerics.fma(widen(a), widen(b), c))
        if base in ("add", "sub"):
            return pure(ins, n, "f32", [kind, "f32"], lambda a, b: function(widen(a), b))
        raise Unsupported(ins.text)
    if base == "fma" and kind in ("bf16", "bf16x2"):
        return pure(ins, n, kind, [kind] * 3, _of_halves(numerics.fma_bf16))
    if kind in ("bf16", "bf16x2", "f16x2") or (base == "fma" and kind == "f64"):
        raise Unsupported(ins.text)
    if kind == "f32x2":
        function = _of_pairs(function)
    if base in ("min", "max") and len(ins.operands) == 4:
        kinds, function = (SAME,) * 3, lambda a, b, c, two=function: two(two(a, b), c)
    return pure(ins, n, kind, [name or kind for name in kinds], function)


def _flushed(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """With .ftz subnormal inputs and results are zeros of the same sign."""
    return lambda *operands: numerics.flush(function(*map(numerics.flush, operands)))


def _of_pairs(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Of two float32 in 64 bits each."""
    return lambda *operands: function(*(a.view(np.float32) for a in operands)).view(np.uint64)


def _of_halves(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Of one or two numbers of 16 bits each."""
    return lambda *operands: function(*(a.view(np.uint16) for a in operands)).view(operands[0].dtype)


def _shift(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """By more than the width, as by the width: numpy leaves that undefined."""

    def shifted(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        bits = a.dtype.itemsize * 8
        last = function(a, np.minimum(count, np.uint32(bits - 1)).astype(a.dtype))
        return np.where(count < bits, last, function(last, a.dtype.type(1)))

    return shifted


def _divide_integers(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; by zero the result is unspecified, here all ones."""
    wide = np.int64 if a.dtype.kind == "i" or a.dtype.itemsize < 8 else np.uint64
    x, y = a.astype(wide), b.astype(wide)
    quotient = np.abs(x) // np.where(y == 0, wide(1), np.abs(y))
    return np.where(b == 0, ~a.dtype.type(0), (quotient * np.sign(x) * np.sign(y)).astype(a.dtype))


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return numerics.divide(a, b) if a.dtype == np.float32 else _divide_integers(a, b)


def _bit_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: the top bit of a signed field is copied upwards."""
    bits = a.dtype.itemsize * 8
    position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
    wide = a.astype(np.int64)
    field = (wide >> np.minimum(position, 63)) & ((1 << np.minimum(length, 32)) - 1)
    if a.dtype.kind == "u":
        return field
    top = np.minimum(position + length - 1, bits - 1)
    sign, kept = (wide >> top) & 1, np.maximum(top - position + 1, 0)
    return np.where((length > 0) & (sign == 1), field | (-1 << np.minimum(kept, 62)), np.where(length > 0, field, 0))


def _permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each four bits of the selector choose one of eight bytes, or (bit 3) eight copies of its sign."""
    both, result = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32)), np.zeros(a.shape, np.uint64)
    for n in range(4):
        chosen = (selector >> np.uint32(4 * n)).astype(np.uint64)
        byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * n)
    return result


def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


OPERATIONS: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "add": ((SAME, SAME), np.add),
    "sub": ((SAME, SAME), np.subtract),
    "div": ((SAME, SAME), _quotient),
    "rem": ((SAME, SAME), lambda a, b: a - _divide_integers(a, b) * b),
    "min": ((SAME, SAME), smaller),
    "max": ((SAME, SAME), larger),
    "and": ((SAME, SAME), np.bitwise_and),
    "or": ((SAME, SAME), np.bitwise_or),
    "xor": ((SAME, SAME), np.bitwise_xor),
    "not": ((SAME,), np.invert),
    "neg": ((SAME,), np.negative),
    "abs": ((SAME,), np.abs),
    "shl": ((SAME, "u32"), _shift(np.left_shift)),
    "shr": ((SAME, "u32"), _shift(np.right_shift)),
    "fma": ((SAME, SAME, SAME), numerics.fma),
    "ex2": ((SAME,), numerics.ex2),
    "tanh": ((SAME,), numerics.tanh),
    "rsqrt": ((SAME,), numerics.rsqrt),
    "bfe": ((SAME, "u32", "u32"), _bit_field),
    "prmt": ((SAME, SAME, "u32"), _permute_bytes),
}


def _mul(ins: Instruction, n: int) -> Run:
    _, *modes, kind = ins.parts
    if "wide" in modes:
        wide = WIDER[kind]
        return pure(ins, n, f"{kind[0]}{2 * int(kind[1:])}", [kind] * 2, lambda a, b: a.astype(wide) * b)
    if "hi" in modes:
        wide, bits = WIDER.get(kind, object), int(kind[1:])  # numpy has nothing wider than 64 bits
        return pure(ins, n, kind, [kind] * 2, lambda a, b: (a.astype(wide) * b.astype(wide)) >> bits)
    if kind == "f32x2" and not set(modes) - {"rn"}:
        return pure(ins, n, kind, [kind] * 2, _of_pairs(np.multiply))
    if set(modes) - {"lo", "rn"} or kind not in ("s16", "u16", "s32", "u32", "s64", "u64", "f32", "f64"):
        raise Unsupported(ins.text)
    return pure(ins, n, kind, [kind] * 2, np.multiply)


def _mad(ins: Instruction, n: int) -> Run:
    _, mode, kind = ins.parts
    if mode == "wide":
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return pure(ins, n, wide, [kind, kind, wide], lambda a, b, c: a.astype(WIDER[kind]) * b + c)
    if mode != "lo":
        raise Unsupported(ins.text)
    return pure(ins, n, kind, [kind] * 3, lambda a, b, c: a * b + c)


def _selp(ins: Instruction, n: int) -> Run:
    kind = ins.parts[-1]
    run = pure(ins, n, kind, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))
    target, a, b, p = (x.number if isinstance(x, Register) else None for x in ins.operands)

    def selected(m: Any, active: Active) -> None:
        run(m, active)
        m.inherit(target, a, b, p, active)

    return selected


ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
UNSIGNED = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, floats: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    """With NaN the ordered comparisons of floats are false, and those with a u are true."""
    if not floats:
        return {**ORDERED, **UNSIGNED, "ne": np.not_equal}.get(name)
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    if name in ("num", "nan"):
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    plain = {**ORDERED, "ne": np.not_equal}.get(name.removesuffix("u") if name[-1] == "u" else name)
    if plain is None:
        return None
    if name[-1] == "u":
        return lambda a, b: plain(a, b) | unordered(a, b)
    return lambda a, b: plain(a, b) & ~unordered(a, b)


def _setp(ins: Instruction, n: int) -> Run:
    _, name, *join, kind = ins.parts
    compare = _comparison(name, kind.startswith(("f", "bf")))
    if compare is None or (join and (len(join) > 1 or join[0] not in JOINS)):
        raise Unsupported(ins.text)
    if kind in ("bf16x2", "f16x2") and not join:
        return _setp_of_pairs(ins, n, compare)
    if kind.endswith("x2") or len(ins.operands) != 3 + len(join):
        raise Unsupported(ins.text)
    if kind == "bf16":
        of_floats = compare
        compare = lambda a, b: of_floats(numerics.from_bf16(a), numerics.from_bf16(b))  # noqa: E731
    if join:
        together = JOINS[join[0]]
        return pure(ins, n, "pred", [kind, kind, "pred"], lambda a, b, p: together(compare(a, b), p))
    return pure(ins, n, "pred", [kind] * 2, compare)


def _setp_of_pairs(ins: Instruction, n: int, compare: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Run:
    """p|q: the lower halves are compared for p, and the upper ones for q."""
    *targets, a, b = ins.operands
    numbers = numerics.from_bf16 if ins.parts[-1] == "bf16x2" else lambda bits: bits.view(np.float16)
    gets = [source(operand, np.uint32, n) for operand in (a, b)]

    def run(m: Any, active: Active) -> None:
        results = compare(*(numbers(get(m).view(np.uint16)) for get in gets)).reshape(n, 2)
        for target, result in zip(targets, results.T, strict=True):
            m.write(target.number, result, active)

    return run


def _mov(ins: Instruction, n: int) -> Run:
    target, value = ins.operands
    if isinstance(target, list):
        return _unpack(target, value, n)
    if isinstance(value, list):
        return _pack(target, value, n)
    get, number = source(value, BITS[target.width], n), target.number
    origin = value.number if isinstance(value, Register) else None

    def run(m: Any, active: Active) -> None:
        m.write(number, get(m), active)
        m.inherit(number, origin, origin, None, active)

    return run


def _unpack(targets: list, value: Operand, n: int) -> Run:
    bits = next(t.width for t in targets if isinstance(t, Register))  # beside the sink _
    get, dtype = source(value, BITS[bits * len(targets)], n), BITS[bits]

    def run(m: Any, active: Active) -> None:
        parts = np.ascontiguousarray(get(m)).view(dtype).reshape(n, -1)
        for target, part in zip(targets, parts.T):
            if isinstance(target, Register):
                m.write(target.number, np.ascontiguousarray(part), active)

    return run


def _pack(target: Register, values: list, n: int) -> Run:
    gets = [source(value, BITS[target.width // len(values)], n) for value in values]

    def run(m: Any, active: Active) -> None:
        together = np.ascontiguousarray(np.stack([get(m) for get in gets], 1))
        m.write(target.number, together.view(BITS[target.width])[:, 0], active)

    return run
