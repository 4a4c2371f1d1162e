"""Single instructions against results worked out by hand from the PTX ISA: those at whose edges no layer comes.

With any other instruction wrong the layers' numbers are.
"""

import numpy as np
import pytest
import torch

from tests.ptx.assembly import computed, executed
from tests.ptx.emulator.operands import Unsupported

I16, I32, I64, F32 = torch.int16, torch.int32, torch.int64, torch.float32
NAN = float("nan")


def ints(*values):
    return torch.tensor(values, dtype=I32)


def floats(*values):
    return torch.tensor(values, dtype=F32)


def bits(*values):
    """32 bits each, as torch's signed integers."""
    return torch.from_numpy(np.array(values, np.uint32).view(np.int32))


@pytest.mark.parametrize(
    ("instruction", "operands", "expected"),
    [
        ("mul.hi.u32 {d}, {a}, {b};", (ints(-1, 65536), ints(-1, 65536)), [-2, 1]),
        ("mad.lo.s32 {d}, {a}, {b}, {c};", (ints(3, -3), ints(5, 5), ints(1, 1)), [16, -14]),
        ("div.s32 {d}, {a}, {b};", (ints(7, -7, 7), ints(2, 2, -2)), [3, -3, -3]),
        ("rem.s32 {d}, {a}, {b};", (ints(7, -7, 7), ints(2, 2, -2)), [1, -1, 1]),
        ("rem.u32 {d}, {a}, {b};", (ints(-1, 9), ints(10, 4)), [5, 1]),
        ("shl.b32 {d}, {a}, {b};", (ints(1, 1, 1), ints(4, 31, 32)), [16, -(2**31), 0]),
        ("shr.s32 {d}, {a}, {b};", (ints(-8, -8, 8), ints(1, 40, 40)), [-4, -1, 0]),
        ("shr.u32 {d}, {a}, {b};", (ints(-8, -8), ints(28, 32)), [15, 0]),
        ("bfe.s32 {d}, {a}, 4, 8;", (bits(0xABCDEF12, 0x00000712),), [0xF1 - 256, 0x71]),
        ("prmt.b32 {d}, {a}, {b}, 0x5410;", (bits(0x03020100), bits(0x07060504)), [0x05040100]),
        ("prmt.b32 {d}, {a}, {b}, 0xb3a2;", (bits(0x80027F00), bits(0x00060504)), [0xFF800002 - 2**32]),
        ("min.u32 {d}, {a}, {b};", (ints(-1, 4), ints(3, 2)), [3, 2]),
        ("setp.hs.u32 {p}, {a}, {b};", (ints(-1, 0, 1), ints(1, 1, 1)), [1, 0, 1]),
        ("setp.leu.f32 {p}, {a}, {b};", (floats(1, 3, NAN), floats(2, 2, 2)), [1, 0, 1]),
        ("setp.ne.f32 {p}, {a}, {b};", (floats(1, 2, NAN), floats(2, 2, 2)), [1, 0, 0]),
        ("setp.num.f32 {p}, {a}, {b};", (floats(1, 2, NAN), floats(2, 2, 2)), [1, 1, 0]),
    ],
)
def test_integers(instruction, operands, expected):
    assert computed(instruction, I32, *operands) == expected


def test_a_register_that_is_wider_than_what_is_loaded():
    """PTX ISA, "Operand Size Exceeding Instruction-Type Size": above it are zeros, or copies of a sign."""
    x, out = torch.tensor([0x1234, -2], dtype=I16), torch.zeros(1, dtype=I32)
    load = "ld.global.{} %r1, [%rd90+2];\nst.global.b32 [%rd91], %r1;"
    executed("setp.ne.s32 %p1, %r90, 0;\n@%p1 bra $end;\n" + load.format("b16") + "\n$end:", x=x, out=out)
    assert out.item() == 0xFFFE
    with pytest.raises(Unsupported, match=r"ld\.global\.s16"):
        executed(load.format("s16"), x=x, out=out)


def test_branches_take_each_thread_where_it_belongs():
    out = torch.zeros(32, dtype=I32)
    executed(
        """
        and.b32 %r1, %r90, 3; mov.b32 %r2, 0; mov.b32 %r3, 0;
        $again:
        add.s32 %r2, %r2, %r90; add.s32 %r3, %r3, 1; setp.le.s32 %p1, %r3, %r1;
        @%p1 bra $again;
        mul.wide.u32 %rd1, %r90, 4; add.s64 %rd1, %rd1, %rd90; st.global.b32 [%rd1], %r2;""".replace(";", ";\n"),
        out=out,
    )
    assert out.tolist() == [n * (n % 4 + 1) for n in range(32)]


@pytest.mark.parametrize(
    "instruction",
    ["add.sat.f32 %r1, %r90, %r90;", "sin.approx.f32 %r1, %r90;", "red.global.gpu.relaxed.add.u32 [%rd90], 1;"],
)
def test_what_the_emulator_lacks_is_named(instruction):
    with pytest.raises(Unsupported, match=instruction.split(".")[0]):
        executed(instruction)
