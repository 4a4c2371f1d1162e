"""Instructions on one thread's registers. Integers are exact; floats are rounded as numpy does it.

PTX ISA, "Integer Arithmetic", "Floating Point", "Comparison and Selection", "Half Precision Comparison", "Logic and
Shift" and "Data Movement: mov, cvt".
"""

from typing import Any

import numpy as np

from tests.ptx.emulator.operands import Active, Function, Run, Unsupported, pure, source
from tests.ptx.emulator.parse import Instruction, Operand, Register

WIDER = {"s32": np.int64, "u32": np.uint64, "s16": np.int32, "u16": np.uint32}
SAME = ""  # an operand of the instruction's own type
MODES = {"rn", "ftz", "approx", "full", "lo"}  # a float's rounding, which is numpy's here


def build(ins: Instruction, n: int) -> Run:
    base, *modes, kind = ins.parts
    maker = {"mov": _mov, "setp": _setp, "mad": _mad, "mul": _mul, "cvt": _cvt}.get(base)
    if maker:
        return maker(ins, n)
    if base not in OPERATIONS or set(modes) - MODES:
        raise Unsupported(ins.text)
    kinds, function = OPERATIONS[base]
    if base in ("min", "max") and len(ins.operands) == 4:
        kinds, function = (SAME,) * 3, lambda a, b, c, two=function: two(two(a, b), c)
    return pure(ins, n, kind, [name or kind for name in kinds], function)


def _shift(function: Function) -> Function:
    """By more than the width, as by the width: numpy leaves that undefined."""

    def shifted(a: np.ndarray, count: np.ndarray) -> np.ndarray:
        bits = a.dtype.itemsize * 8
        last = function(a, np.minimum(count, np.uint32(bits - 1)).astype(a.dtype))
        return np.where(count < bits, last, function(last, a.dtype.type(1)))

    return shifted


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers towards zero; by zero the result is unspecified, here all ones."""
    if a.dtype.kind == "f":
        return a / b
    wide = np.int64 if a.dtype.kind == "i" or a.dtype.itemsize < 8 else np.uint64
    x, y = a.astype(wide), b.astype(wide)
    quotient = np.abs(x) // np.where(y == 0, wide(1), np.abs(y))
    return np.where(b == 0, ~a.dtype.type(0), (quotient * np.sign(x) * np.sign(y)).astype(a.dtype))


def _bit_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: the top bit of a signed field is copied upwards."""
    position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
    field = (a.astype(np.int64) >> np.minimum(position, 63)) & ((1 << np.minimum(length, 32)) - 1)
    is_negative = (a.dtype.kind == "i") & (length > 0) & (field >> np.maximum(length - 1, 0) & 1 == 1)
    return np.where(is_negative, field | (-1 << np.minimum(length, 62)), field)


def _permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each four bits of the selector choose one of eight bytes, or (bit 3) eight copies of its sign."""
    both, result = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32)), np.zeros(a.shape, np.uint64)
    for n in range(4):
        chosen = (selector >> np.uint32(4 * n)).astype(np.uint64)
        byte = (both >> ((chosen & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(chosen & np.uint64(8), sign, byte) << np.uint64(8 * n)
    return result


OPERATIONS: dict[str, tuple[tuple[str, ...], Function]] = {
    "add": ((SAME, SAME), np.add),
    "sub": ((SAME, SAME), np.subtract),
    "div": ((SAME, SAME), _quotient),
    "rem": ((SAME, SAME), lambda a, b: a - _quotient(a, b) * b),
    "min": ((SAME, SAME), np.fmin),
    "max": ((SAME, SAME), np.fmax),
    "and": ((SAME, SAME), np.bitwise_and),
    "or": ((SAME, SAME), np.bitwise_or),
    "xor": ((SAME, SAME), np.bitwise_xor),
    "not": ((SAME,), np.invert),
    "neg": ((SAME,), np.negative),
    "abs": ((SAME,), np.abs),
    "shl": ((SAME, "u32"), _shift(np.left_shift)),
    "shr": ((SAME, "u32"), _shift(np.right_shift)),
    "fma": ((SAME, SAME, SAME), lambda a, b, c: (a.astype(np.float64) * b + c).astype(c.dtype)),
    "ex2": ((SAME,), np.exp2),
    "tanh": ((SAME,), np.tanh),
    "rsqrt": ((SAME,), lambda a: 1 / np.sqrt(a)),
    "bfe": ((SAME, "u32", "u32"), _bit_field),
    "prmt": ((SAME, SAME, "u32"), _permute_bytes),
    "selp": ((SAME, SAME, "pred"), lambda a, b, p: np.where(p if a.ndim == 1 else p[:, None], a, b)),
}


def _mul(ins: Instruction, n: int) -> Run:
    _, *modes, kind = ins.parts
    if "wide" in modes:
        wide = WIDER[kind]
        return pure(ins, n, f"{kind[0]}{2 * int(kind[1:])}", [kind] * 2, lambda a, b: a.astype(wide) * b)
    if "hi" in modes:
        wide, bits = WIDER.get(kind, object), int(kind[1:])  # numpy has nothing wider than 64 bits
        return pure(ins, n, kind, [kind] * 2, lambda a, b: (a.astype(wide) * b.astype(wide)) >> bits)
    if set(modes) - MODES:
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


def _cvt(ins: Instruction, n: int) -> Run:
    """Of two operands the first becomes the upper half of a pair."""
    *modes, to, given = ins.parts[1:]
    if set(modes) - {"rn", "rna"} or (given[0] not in "us" and to[0] in "us"):
        raise Unsupported(ins.text)
    pair = lambda a, b: np.stack([b, a], 1)  # noqa: E731
    return pure(ins, n, to, [given] * (len(ins.operands) - 1), pair if to.endswith("x2") else np.asarray)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, is_float: bool) -> Function | None:
    """With NaN the ordered comparisons of floats are false, and those with a u are true."""
    if not is_float:
        return COMPARISONS.get(name)
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    if name in ("num", "nan"):
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    plain = COMPARISONS.get(name.removesuffix("u"))
    if plain is None:
        return None
    if name[-1] == "u":
        return lambda a, b: plain(a, b) | unordered(a, b)
    return lambda a, b: plain(a, b) & ~unordered(a, b)


def _setp(ins: Instruction, n: int) -> Run:
    """p|q, of pairs: the lower halves are compared for p, and the upper ones for q."""
    _, name, *join, kind = ins.parts
    compare = _comparison(name, kind.startswith(("f", "bf")))
    targets = 2 if kind.endswith("x2") else 1
    if compare is None or join not in ([], *([each] for each in JOINS)) or len(ins.operands) != targets + 2 + len(join):
        raise Unsupported(ins.text)
    if join:
        return pure(ins, n, "pred", [kind, kind, "pred"], lambda a, b, p: JOINS[join[0]](compare(a, b), p))
    gets = [source(operand, kind, n) for operand in ins.operands[targets:]]

    def run(m: Any, active: Active) -> None:
        results = compare(*(get(m) for get in gets)).reshape(n, targets)
        for target, result in zip(ins.operands, results.T):
            m.write(target.number, np.ascontiguousarray(result), active)

    return run


def _mov(ins: Instruction, n: int) -> Run:
    target, value = ins.operands
    if isinstance(target, list):
        return _unpack(target, value, n)
    if isinstance(value, list):
        return _pack(target, value, n)
    kind = "pred" if target.width == 1 else f"b{target.width}"
    return pure(ins, n, kind, [kind], np.asarray)


def _unpack(targets: list, value: Operand, n: int) -> Run:
    bits = next(t.width for t in targets if isinstance(t, Register))  # beside the sink _
    get = source(value, f"b{bits * len(targets)}", n)

    def run(m: Any, active: Active) -> None:
        parts = np.ascontiguousarray(get(m)).view(f"u{bits // 8}").reshape(n, -1)
        for target, part in zip(targets, parts.T):
            if isinstance(target, Register):
                m.write(target.number, np.ascontiguousarray(part), active)

    return run


def _pack(target: Register, values: list, n: int) -> Run:
    gets = [source(value, f"b{target.width // len(values)}", n) for value in values]

    def run(m: Any, active: Active) -> None:
        together = np.ascontiguousarray(np.stack([get(m) for get in gets], 1))
        m.write(target.number, together.view(f"u{target.width // 8}")[:, 0], active)

    return run
