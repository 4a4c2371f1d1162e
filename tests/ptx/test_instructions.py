"""Single instructions against results worked out by hand from the PTX ISA.

They are those at whose edges no layer comes, those that other versions of Triton emit, and roundings that are too fine
for the layers' bounds. With any other instruction wrong the layers' numbers are.
"""

import math

import numpy as np
import pytest
import torch

from tests.ptx.assembly import computed, executed
from tests.ptx.emulator import numerics, parse
from tests.ptx.emulator.operands import Unsupported

I16, I32, I64, F32 = torch.int16, torch.int32, torch.int64, torch.float32
NAN, INF = float("nan"), float("inf")


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
        (
            "mov.b64 %rd1, {{{a}, {b}}}; mul.hi.u64 %rd2, %rd1, %rd1; cvt.u32.u64 {d}, %rd2;",
            (ints(0, -1), ints(1, -1)),
            [1, -2],
        ),
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
        ("not.b32 {d}, {a};", (ints(0, 5),), [-1, -6]),
        ("min.u32 {d}, {a}, {b};", (ints(-1, 4), ints(3, 2)), [3, 2]),
        ("setp.lt.u32 {p}, {a}, {b};", (ints(-1, 0), ints(1, 1)), [0, 1]),
        ("setp.hs.u32 {p}, {a}, {b};", (ints(-1, 1), ints(1, 1)), [1, 1]),
    ],
)
def test_integers(instruction, operands, expected):
    assert computed(instruction, I32, *operands) == expected


def test_wide_products():
    assert computed("mul.wide.s32 {d}, {a}, {b};", I64, ints(-(2**31), 3), ints(2, 4)) == [-(2**32), 12]
    assert computed("mul.wide.u32 {d}, {a}, 2;", I64, ints(-1)) == [2 * (2**32 - 1)]
    c = torch.tensor([5, -5])
    assert computed("mad.wide.s32 {d}, {a}, {b}, {c};", I64, ints(-(2**31), 3), ints(2, 4), c) == [5 - 2**32, 7]


@pytest.mark.parametrize(
    ("instruction", "operands", "expected"),
    [
        ("fma.rn.f32 {d}, {a}, {b}, {c};", (floats(1 + 2**-12), floats(1 + 2**-12), floats(-1)), [2**-11 + 2**-24]),
        ("max.f32 {d}, {a}, {b};", (floats(NAN, 1, -1), floats(2, NAN, -3)), [2, 1, -1]),
        ("cvt.rn.f32.s32 {d}, {a};", (ints(2**24 + 1, 2**24 + 3, -7),), [2**24, 2**24 + 4, -7]),
        ("tanh.approx.f32 {d}, {a};", (floats(0, INF, -INF),), [0, 1, -1]),
        ("ex2.approx.f32 {d}, {a};", (floats(-INF, INF),), [0, INF]),
    ],
)  # fmt: skip
def test_floats(instruction, operands, expected):
    assert computed(instruction, F32, *operands) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eq", [0, 1, 0]), ("ne", [1, 0, 0]), ("lt", [1, 0, 0]), ("ge", [0, 1, 0]), ("equ", [0, 1, 1]),
        ("neu", [1, 0, 1]), ("ltu", [1, 0, 1]), ("geu", [0, 1, 1]), ("num", [1, 1, 0]), ("nan", [0, 0, 1]),
    ],
)  # fmt: skip
def test_comparisons_with_nan(name, expected):
    assert computed(f"setp.{name}.f32 {{p}}, {{a}}, {{b}};", I32, floats(1, 2, NAN), floats(2, 2, 2)) == expected


def test_approximate_functions_are_off_by_no_more_than_documented():
    x = torch.linspace(-4, 4, 32)
    tanh = torch.tensor(computed("tanh.approx.f32 {d}, {a};", F32, x), dtype=torch.double)
    ex2 = torch.tensor(computed("ex2.approx.f32 {d}, {a};", F32, x), dtype=torch.double)
    rsqrt = torch.tensor(computed("rsqrt.approx.ftz.f32 {d}, {a};", F32, x + 9), dtype=torch.double)
    quotient = torch.tensor(computed("div.full.f32 {d}, {a}, {b};", F32, x, x + 9), dtype=torch.double)
    for got, want, bound in (
        (tanh, x.double().tanh(), 2**-10.987 + 2**-24),
        (ex2, x.double().exp2(), 2**-22 + 2**-24),
        (rsqrt, (x + 9).double().rsqrt(), 2**-22.9 + 2**-24),
        (quotient, x.double() / (x + 9).double(), 2 * 2**-23),
    ):
        error = ((got - want).abs() / want.abs()).max()
        assert bound / 4 < error <= bound


@pytest.mark.parametrize(
    ("given", "bf16", "tf32"),
    [
        (0x3F808000, 0x3F80, 0x3F808000),  # halfway: to even
        (0x3F818000, 0x3F82, 0x3F818000),
        (0x3F808001, 0x3F81, 0x3F808000),
        (0x3F801000, 0x3F80, 0x3F802000),  # halfway of tf32: away from zero
        (0xBF801000, 0xBF80, 0xBF802000),
        (0x7F800000, 0x7F80, 0x7F800000),
        (0x7F7FFFFF, 0x7F80, 0x7F800000),
    ],
)
def test_narrow_floats(given, bf16, tf32):
    a = bits(given)
    assert computed("cvt.rn.bf16.f32 {d}, {a};", I16, a)[0] & 0xFFFF == bf16
    assert computed("cvt.rna.tf32.f32 {d}, {a};", I32, a)[0] & 0xFFFFFFFF == tf32
    assert computed("cvt.rn.bf16x2.f32 {d}, {a}, {b};", I32, a, bits(0))[0] & 0xFFFFFFFF == bf16 << 16


def test_fma_of_bf16_rounds_once():
    """1 + 2^-8 lies halfway between 1 and the next number: it goes to 1, and anything above it to the next."""
    one, tiny, half = 0x3F80, 0x2E80, 0x3B80  # 1, 2^-34, 2^-8
    a = torch.tensor([one, one | 1, one], dtype=I16)
    b = torch.tensor([half, one, tiny], dtype=I16)
    c = torch.tensor([one, half, one], dtype=I16)
    assert computed("fma.rn.bf16 {d}, {a}, {b}, {c};", I16, a, b, c) == [one, one | 2, one]
    above = torch.tensor([half | 1], dtype=I16)
    assert computed("fma.rn.bf16 {d}, {a}, {b}, {c};", I16, above, a[:1], a[:1]) == [one | 1]
    pair = bits(one << 16 | half)
    assert computed("fma.rn.bf16x2 {d}, {a}, {b}, {c};", I32, pair, bits(one << 16 | one), pair) == [0x40003C00]


def test_ftz_makes_zeros_of_subnormal_numbers():
    """PTX ISA, "Floating Point Instructions: fma". The smallest normal number is 2^-126, with the bits 0x00800000."""
    tiny, least = 2.0**-127, 2.0**-149  # both subnormal
    cases = [
        (tiny, 2.0, 0.0, 0x00000000),  # one of the factors, where the product is normal
        (2.0, -tiny, -0.0, 0x80000000),  # a zero keeps its sign
        (1.0, 2.0**-126, least, 0x00800000),  # what is added
        (2.0**-100, 2.0**-27, 0.0, 0x00000000),  # the result of normal numbers
        (2.0**-100, -(2.0**-27), 0.0, 0x80000000),
        (2.0**-100, 2.0**-26, 0.0, 0x00800000),  # normal
        (1 + 2.0**-12, 1 + 2.0**-12, -1.0, 0x3A000400),  # 2^-11 + 2^-24: rounded once
        (tiny, INF, 0.0, 0x7FFFFFFF),  # zero times infinity
    ]
    a, b, c, expected = zip(*cases)
    got = computed("fma.rn.ftz.f32 {d}, {a}, {b}, {c};", I32, floats(*a), floats(*b), floats(*c))
    assert got[:-1] == bits(*expected[:-1]).tolist()
    assert torch.tensor(got, dtype=I32).view(F32)[-1].isnan()
    plain = computed("fma.rn.f32 {d}, {a}, {b}, {c};", I32, floats(tiny, 1.0), floats(2.0, 2.0**-126), floats(0, least))
    assert plain == [0x00800000, 0x00800001]


def test_comparisons_of_bf16():
    """PTX ISA, "Half Precision Comparison Instructions: setp". A sign makes the bits of a number larger."""
    minus_one, one, nan, minus_infinity = 0xBF80 - 2**16, 0x3F80, 0x7FC0, 0xFF80 - 2**16
    a = torch.tensor([minus_one, one, nan, minus_infinity], dtype=I16)
    b = torch.tensor([one, one, one, minus_one], dtype=I16)
    for name, expected in (("lt", [1, 0, 0, 1]), ("nan", [0, 0, 1, 0]), ("geu", [0, 1, 1, 0])):
        assert computed(f"setp.{name}.bf16 {{p}}, {{a}}, {{b}};", I32, a, b) == expected


@pytest.mark.parametrize(
    ("kind", "one", "two", "nan"), [("bf16", 0x3F80, 0x4000, 0x7FC0), ("f16", 0x3C00, 0x3C01, 0x7E00)]
)
def test_comparisons_of_two_halves_at_once(kind, one, two, nan):
    """The first predicate is that of the lower halves."""
    a, b = (
        bits(two << 16 | one, one << 16 | two, nan << 16 | one),
        bits(one << 16 | two, two << 16 | one, one << 16 | one),
    )
    for name, lower, upper in (("lt", [1, 0, 0], [0, 1, 0]), ("leu", [1, 0, 1], [0, 1, 1])):
        compare = f"setp.{name}.{kind}x2 %p2|%p3, {{a}}, {{b}};\n"
        for predicate, expected in (("%p2", lower), ("%p3", upper)):
            assert computed(compare + f"selp.b32 {{d}}, 1, 0, {predicate};", I32, a, b) == expected
    with pytest.raises(Unsupported, match="setp"):
        computed("setp.lt.f32 {p}|%p2, {a}, {b};", I32, floats(1), floats(2))


def test_a_register_that_is_wider_than_what_is_loaded():
    """PTX ISA, "Operand Size Exceeding Instruction-Type Size": above it are zeros, or copies of a sign."""
    x, out = torch.tensor([0x1234, -2], dtype=I16), torch.zeros(1, dtype=I32)
    load = "ld.global.{} %r1, [%rd90+2];\nst.global.b32 [%rd91], %r1;"
    device = executed("setp.ne.s32 %p1, %r90, 0;\n@%p1 bra $end;\n" + load.format("b16") + "\n$end:", x=x, out=out)
    assert out.item() == 0xFFFE
    assert not device.findings, device.findings
    with pytest.raises(Unsupported, match=r"ld\.global\.s16"):
        executed(load.format("s16"), x=x, out=out)
    with pytest.raises(Unsupported, match=r"ld\.global\.b64"):
        executed(load.format("b64"), x=x, out=out)


@pytest.mark.parametrize(
    ("mode", "b", "c", "origin"),
    [
        ("bfly", 4, 31, lambda lane: lane ^ 4),
        ("idx", 3, 31, lambda lane: 3),
        ("up", 2, 0, lambda lane: lane - 2 if lane >= 2 else lane),
        ("down", 5, 31, lambda lane: lane + 5 if lane < 27 else lane),
        ("idx", 3, 0x181F, lambda lane: lane // 8 * 8 + 3),  # segments of 8
        ("down", 5, 0x181F, lambda lane: lane + 5 if lane % 8 < 3 else lane),
    ],
)
def test_shfl(mode, b, c, origin):
    got = computed(f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {b}, {c}, -1;", I32, torch.arange(32, dtype=I32))
    assert got == [origin(lane) for lane in range(32)]


def test_redux_passes_over_nan():
    x = torch.linspace(-3, 2, 32)
    x[5] = NAN
    assert computed("redux.sync.max.abs.f32 {d}, {a}, -1;", F32, x) == [3.0] * 32
    assert computed("redux.sync.min.f32 {d}, {a}, -1;", F32, x) == [-3.0] * 32


def test_tensor_cores_cut_off_what_lies_below_the_largest():
    """Beside 1 an A100 keeps bits to 2^-24, an H100 to 2^-25; float32's sum ends at 2^-23, and is cut off there."""
    A, B, C = np.zeros((1, 1, 16), np.float32), np.full((1, 16, 1), 2**-12, np.float32), np.ones((1, 1, 1), np.float32)
    A[0, 0, :4] = 2**-13
    results = [numerics.multiply_accumulate(A, B, C, *sums).item() for sums in ((8, 1), (16, 2))]
    assert results == [1.0, 1 + 2**-23]
    A[0, 0, :4] = [2**-12, 2**-12, 0, 0]
    assert numerics.multiply_accumulate(A, B, C, 8, 1).item() == 1 + 2**-23
    A[0, 0, :4] = [2**-12, 0, 0, 0]
    assert numerics.multiply_accumulate(A, B, C, 16, 2).item() == 1.0


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
    [
        "add.ftz.f32 %r1, %r90, %r90;",
        "sin.approx.f32 %r1, %r90;",
        "tcgen05.wait::ld.sync.aligned;",
        "red.global.gpu.relaxed.add.u32 [%rd90], 1;",
        "membar.gl;",
    ],
)
def test_what_the_emulator_lacks_is_named(instruction):
    with pytest.raises(Unsupported, match=instruction.split(".")[0]):
        executed(instruction)


def test_a_module_is_read_with_its_source_lines():
    text = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u32 k_param_1
)
.reqntid 64
{
	.reg .b32 	%r<3>;
$L__BB0_1:
	.loc	1 7 5                           // layer.py:7:5
	@!%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + -8 ]; // a comment
	bra $L__BB0_1;
}
"""
    kernel = parse.parse(text)
    load, branch = kernel.instructions
    assert (kernel.name, kernel.threads, kernel.parameters) == ("k", 64, ["k_param_0", "k_param_1"])
    assert (load.opcode, load.negated, load.guard.name) == ("ld.global.v2.b32", True, "%p1")
    assert [r.name for r in load.operands[0]] == ["%r1", "%r2"]
    assert (load.operands[1].base.name, load.operands[1].offset) == ("%rd1", -8)
    assert (load.line, load.where) == (11, "layer.py:7:5")
    assert kernel.labels[branch.operands[0]] == 0
    assert math.prod(r.width for r in kernel.registers.values()) == 32 * 32 * 64
