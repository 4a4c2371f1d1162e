"""Conversions. PTX ISA, "Data Movement and Conversion Instructions: cvt"."""

from collections.abc import Callable

import numpy as np

from tests.ptx.emulator import numerics
from tests.ptx.emulator.operands import TYPES, Run, Unsupported, pure
from tests.ptx.emulator.parse import Instruction


def _to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def _packed(convert: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """The first operand becomes the upper half."""
    return lambda a, b: (convert(a).astype(np.uint32) << np.uint32(16)) | convert(b).astype(np.uint32)


FLOATS: dict[str, Callable[..., np.ndarray]] = {
    "rn.bf16.f32": numerics.to_bf16,
    "rn.f16.f32": lambda x: x.astype(np.float16),
    "rn.bf16x2.f32": _packed(numerics.to_bf16),
    "rn.f16x2.f32": _packed(_to_f16),
    "rna.tf32.f32": lambda x: numerics.to_tf32(x).view(np.float32),
    "f32.bf16": numerics.from_bf16,
    "f32.f16": lambda x: x.astype(np.float32),
}


def build(ins: Instruction, n: int) -> Run:
    name = ins.opcode.removeprefix("cvt.")
    *modes, to, given = name.split(".")
    operands = [given] * (len(ins.operands) - 1)
    if name in FLOATS:
        return pure(ins, n, to, operands, FLOATS[name])
    integers = given[0] in "us" and (to[0] in "us" if not modes else modes == ["rn"] and to == "f32")
    if not integers:
        raise Unsupported(ins.text)
    return pure(ins, n, to, operands, lambda x: x.astype(TYPES[to]))
