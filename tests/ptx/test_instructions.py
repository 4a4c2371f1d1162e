"""Single instructions where no layer comes: with any other one wrong the layers' numbers are."""

import pytest
import torch

from tests.ptx.assembly import executed
from tests.ptx.emulator.operands import Unsupported

I16, I32 = torch.int16, torch.int32


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
