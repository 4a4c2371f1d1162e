"""Values of operands, and instructions that are functions of them. PTX ISA, "Operand Type Information"."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from tests.ptx.emulator.parse import Immediate, Instruction, Operand, Register

NUMBERS: dict[str, Any] = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
BITS: dict[int, Any] = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
Active: TypeAlias = np.ndarray | None  # the threads that an instruction runs for, None for all
Run: TypeAlias = Callable[[Any, Active], None]  # an instruction, as a function of the machine
Function: TypeAlias = Callable[..., Any]


class Unsupported(NotImplementedError):
    """An instruction, or a form of one, that the emulator lacks."""


def bits_of(kind: str) -> int:
    """The bits of a value, which may be a pair, such as f16x2."""
    one = kind.removesuffix("x2")
    size = 1 if one == "pred" else np.dtype(NUMBERS[one]).itemsize * 8
    return 2 * size if kind.endswith("x2") else size


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """The numbers (n,) of bits, or (n, 2) of pairs. bf16 becomes float32."""
    one = kind.removesuffix("x2")
    numbers = np.ascontiguousarray(bits).view(NUMBERS[one])
    numbers = (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32) if one == "bf16" else numbers
    return numbers.reshape(-1, 2) if kind.endswith("x2") else numbers


def encode(numbers: np.ndarray, kind: str) -> np.ndarray:
    """The bits (n,) of numbers (n,) or of pairs (n, 2)."""
    one = kind.removesuffix("x2")
    bits = _to_bf16(numbers) if one == "bf16" else _to_tf32(numbers) if one == "tf32" else numbers
    bits = np.ascontiguousarray(bits.astype(NUMBERS[one], copy=False))
    return bits.view(BITS[bits_of(kind)]).reshape(-1)


def _to_bf16(numbers: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(numbers.astype(np.float32)).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)  # to nearest even
    return np.where(np.isnan(numbers), np.uint32(0x7FFF), rounded)


def _to_tf32(numbers: np.ndarray) -> np.ndarray:
    bits = numbers.view(np.uint32)
    return np.where(np.isfinite(numbers), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).view(np.float32)


def constant(text: str, kind: str, n: int) -> np.ndarray:
    """An immediate for n threads. PTX ISA, "Constants"."""
    value = int(text[2:], 16) if text.lower().startswith(("0f", "0d")) else int(text.rstrip("U"), 0)
    size = bits_of(kind)
    return decode(np.full(n, value != 0 if size == 1 else value & ((1 << size) - 1), BITS[size]), kind)


def source(operand: Operand, kind: str, n: int) -> Callable[[Any], np.ndarray]:
    """A function of the machine that gives an operand's values (n,) as numbers of a kind."""
    if isinstance(operand, Register):
        number, bits = operand.number, BITS[bits_of(kind)]
        return lambda m: decode(m.values[number].astype(bits, copy=False), kind)
    if isinstance(operand, Immediate):
        fixed = constant(operand.text, kind, n)
        return lambda m: fixed
    if isinstance(operand, str):
        return lambda m: m.special(operand).astype(NUMBERS[kind])
    raise Unsupported(f"an operand must be a register, a constant or a name, got {operand}")


def pure(ins: Instruction, n: int, result: str, kinds: Sequence[str], function: Function) -> Run:
    """The instruction d = function(operands), whose operands are of `kinds` and d of the kind `result`."""
    target, *operands = ins.operands
    gets = [source(operand, kind, n) for operand, kind in zip(operands, kinds, strict=True)]
    number, bits = target.number, BITS[target.width]

    def run(m: Any, active: Active) -> None:
        m.write(number, encode(function(*(get(m) for get in gets)), result).astype(bits, copy=False), active)

    return run


def registers_of(operand: Operand) -> list[Register]:
    """The registers that an operand names."""
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, list):
        return [register for part in operand for register in registers_of(part)]
    base = getattr(operand, "base", None)
    return [base] if isinstance(base, Register) else []


def listed(operand: Operand) -> list[Operand]:
    """The parts of a vector operand, or the operand as the only one."""
    return operand if isinstance(operand, list) else [operand]
