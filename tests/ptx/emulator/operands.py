"""Values of operands, and instructions that are functions of them. PTX ISA, "Operand Type Information"."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from tests.ptx.emulator.parse import Immediate, Instruction, Operand, Register

TYPES: dict[str, Any] = {
    "pred": np.bool_, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "bf16x2": np.uint32, "f16x2": np.uint32, "f32x2": np.uint64,
}  # fmt: skip
BITS: dict[int, Any] = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}
Active: TypeAlias = np.ndarray | None  # the threads that an instruction runs for, None for all
Run: TypeAlias = Callable[[Any, Active], None]  # an instruction, as a function of the machine


class Unsupported(NotImplementedError):
    """An instruction, or a form of one, that the emulator lacks."""


def constant(text: str, dtype: Any, n: int) -> np.ndarray:
    """An immediate for n threads. PTX ISA, "Constants"."""
    if text.lower().startswith("0f"):
        return np.full(n, int(text[2:], 16), np.uint32).view(dtype)
    if text.lower().startswith("0d"):
        return np.full(n, int(text[2:], 16), np.uint64).view(dtype)
    value = int(text.rstrip("U"), 0)
    if dtype == np.bool_:
        return np.full(n, value != 0)
    bits = np.dtype(dtype).itemsize * 8
    return np.full(n, value & ((1 << bits) - 1), BITS[bits]).view(dtype)


def source(operand: Operand, dtype: Any, n: int) -> Callable[[Any], np.ndarray]:
    """A function of the machine that gives an operand's values (n,) as `dtype`."""
    if isinstance(operand, Register):
        number, size = operand.number, np.dtype(dtype).itemsize * 8
        if dtype == np.bool_ or operand.width == size:
            return lambda m: m.values[number].view(dtype)
        return lambda m: m.values[number].astype(BITS[size]).view(dtype)
    if isinstance(operand, Immediate):
        fixed = constant(operand.text, dtype, n)
        return lambda m: fixed
    if isinstance(operand, str):
        return lambda m: m.special(operand).astype(dtype)
    raise Unsupported(f"an operand must be a register, a constant or a name, got {operand}")


def pure(ins: Instruction, n: int, result: str, kinds: Sequence[str], function: Callable[..., np.ndarray]) -> Run:
    """The instruction d = function(operands), whose operands are of `kinds` and d of the kind `result`."""
    target, *operands = ins.operands
    gets = [source(operand, TYPES[kind], n) for operand, kind in zip(operands, kinds, strict=True)]
    number, bits, dtype = target.number, BITS[target.width], TYPES[result]
    fits = np.dtype(dtype).itemsize == np.dtype(bits).itemsize

    def run(m: Any, active: Active) -> None:
        value = function(*(get(m) for get in gets)).astype(dtype, copy=False)
        m.write(number, value.view(bits) if fits else value.astype(bits), active)

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
