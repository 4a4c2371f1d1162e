"""Matrix instructions: where each element of a fragment lies, by the formulas of the PTX ISA, and what comes out.

The matrices hold small integers, of which every product and sum is exact.
"""

import numpy as np
import pytest
import torch

from tests.ptx.assembly import executed
from tests.ptx.emulator.numerics import to_bf16
from tests.ptx.emulator.shared import BASE
from tests.ptx.emulator.wgmma import FIELDS, matrix_offsets

LANES = range(32)


def small(*shape, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)


def words(values, kind):
    """Pairs (or one tf32) as registers of 32 bits: the first element is the lower half."""
    values = np.asarray(values, np.float32)
    if kind == "tf32":
        return values.view(np.int32)
    narrow = to_bf16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(narrow).view(np.int32)


def a_element(lane, i, kind):
    """(row, column) of a_i: "Matrix Fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k8"."""
    group, member = lane >> 2, lane % 4
    if kind == "tf32":
        return (group if i in (0, 2) else group + 8), (member if i < 2 else member + 4)
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, member * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_element(lane, i, kind):
    group, member = lane >> 2, lane % 4
    if kind == "tf32":
        return (member if i == 0 else member + 4), group
    return member * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_element(lane, i):
    return (lane >> 2) + (8 if i % 4 >= 2 else 0), (lane % 4) * 2 + (i & 1) + 8 * (i // 4)


def loaded(name, register, first, count):
    """Lines that load `count` registers of 4 bytes of each thread from the tensor in %rd`name`."""
    lines = [f"mul.wide.u32 %rd1, %r90, {4 * count}; add.s64 %rd{register}, %rd1, %rd{name};"]
    lines += [f"ld.global.b32 %r{first + n}, [%rd{register} + {4 * n}];" for n in range(count)]
    return "\n".join(lines)


def stored(name, register, first, count):
    lines = [f"mul.wide.u32 %rd1, %r90, {4 * count}; add.s64 %rd{register}, %rd1, %rd{name};"]
    lines += [f"st.global.b32 [%rd{register} + {4 * n}], %r{first + n};" for n in range(count)]
    return "\n".join(lines)


def registers(first, count):
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


@pytest.mark.parametrize(("kind", "K"), [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_mma(kind, K):
    A, B, C = small(16, K), small(K, 8, seed=1), small(16, 8, seed=2)
    parts = 1 if kind == "tf32" else 2
    a = words([[A[a_element(lane, i, kind)] for i in range(4 * parts)] for lane in LANES], kind)
    b = words([[B[b_element(lane, i, kind)] for i in range(2 * parts)] for lane in LANES], kind)
    c = np.array([[C[c_element(lane, i)] for i in range(4)] for lane in LANES], np.float32)
    d = torch.zeros(32, 4)
    device = executed(
        f"""{loaded(90, 10, 1, 4)} {loaded(91, 11, 5, 2)} {loaded(92, 12, 7, 4)}
        mma.sync.aligned.m16n8k{K}.row.col.f32.{kind}.{kind}.f32
            {registers(11, 4)}, {registers(1, 4)}, {registers(5, 2)}, {registers(7, 4)};
        {stored(93, 13, 11, 4)}""",
        a=torch.from_numpy(a), b=torch.from_numpy(b), c=torch.from_numpy(c), d=d,
    )  # fmt: skip
    assert not device.findings, device.findings
    want = A @ B + C
    assert d.tolist() == [[want[c_element(lane, i)] for i in range(4)] for lane in LANES]
    assert device.counts["mma"] == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Four matrices of 8 rows of 16 bytes, row after row.

    PTX ISA, "ldmatrix": a lane gets elements 2 (lane % 4) and the next of row lane / 4, or of that column.
    """
    elements = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    trans, d, back = (
        ".trans" * transposed,
        torch.zeros(32, count, dtype=torch.int32),
        torch.zeros(256, dtype=torch.int32),
    )
    given = torch.from_numpy(elements.view(np.int32).reshape(32, 4).copy())
    device = executed(
        f"""{loaded(90, 10, 1, 4)}
        mov.b32 %r30, global_smem; shl.b32 %r31, %r90, 4; add.s32 %r32, %r30, %r31;
        st.shared.v4.b32 [%r32], {registers(1, 4)};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers(11, count)}, [%r32];
        {stored(91, 11, 11, count)}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r32 + 512], {registers(11, count)};
        bar.sync 0;
        setp.lt.u32 %p1, %r90, {8 * count};
        @%p1 ld.shared.v4.b32 {registers(21, 4)}, [%r32 + 512];
        mul.wide.u32 %rd2, %r90, 16; add.s64 %rd3, %rd2, %rd92;
        @%p1 st.global.v4.b32 [%rd3], {registers(21, 4)};""",
        shared_bytes=1024, given=given, d=d, back=back,
    )  # fmt: skip
    assert not device.findings, device.findings
    matrices = elements.swapaxes(1, 2) if transposed else elements
    for lane in LANES:
        pairs = [matrices[k, lane // 4, 2 * (lane % 4) :][:2] for k in range(count)]
        assert d[lane].tolist() == [int(low) | int(high) << 16 for low, high in pairs]
    assert back.numpy().view(np.uint16)[: 64 * count].tolist() == elements[:count].ravel().tolist()


def descriptor(**fields):
    return sum(value << FIELDS[name][0] for name, value in fields.items())


def test_layouts_of_descriptors():
    """PTX ISA, "Shared Memory Matrix Layout": core matrices of 8 rows of 16 bytes; rows of 128 bytes, whose chunks are
    exchanged by the xor of their number with the row's.
    """
    plain = matrix_offsets(
        descriptor(start_address=64, leading_dimension_byte_offset=8, stride_dimension_byte_offset=16), 64, False
    )
    assert plain[0, :9].tolist() == [1024 + n for n in (0, 2, 4, 6, 8, 10, 12, 14, 128)]
    assert plain[[1, 7, 8], 0].tolist() == [1024 + n for n in (16, 112, 256)]
    wide = descriptor(start_address=64, stride_dimension_byte_offset=64, swizzle_mode=1)
    swizzled = matrix_offsets(wide, 64, False)
    assert swizzled[[0, 1, 2, 8, 9], 0].tolist() == [1024 + n for n in (0, 128 + 16, 256 + 32, 1024, 1152 + 16)]
    assert swizzled[1, 8] == 1024 + 128  # chunk 1 of row 1
    turned = matrix_offsets(wide | descriptor(leading_dimension_byte_offset=128), 128, True)
    assert turned[0, [0, 1, 8]].tolist() == [1024 + n for n in (0, 128 + 16, 8 * 128)]  # k goes down the rows
    assert turned[[1, 8, 64], 0].tolist() == [1024 + n for n in (2, 16, 2048)]


WGMMA = """
        {a}
        mov.b32 %r30, global_smem; shl.b32 %r31, %r90, 4; add.s32 %r32, %r30, %r31;
        {b}
        st.shared.v4.b32 [%r32], {{%r5, %r6, %r7, %r8}};
        {proxy}
        {barrier}
        {zeros}
        {fence}
        mov.b64 %rd40, {descriptor};
        wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
            {{%r11, %r12, %r13, %r14}}, {{%r1, %r2, %r3, %r4}}, %rd40, 1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        {wait}
        {d}"""


def wgmma(**changes):
    """D = A B for A (64, 16) in registers of four warps and B (16, 8) in shared memory, K-major without a swizzle, in
    the first 256 bytes. `changes` replace lines.
    """
    A, B = small(64, 16), small(16, 8, seed=1)
    a = words(
        [
            [A[16 * warp : 16 * warp + 16][a_element(lane, i, "bf16")] for i in range(8)]
            for warp in range(4)
            for lane in LANES
        ],
        "bf16",
    )
    cores = np.zeros(
        (128, 8), np.float32
    )  # a chunk of 16 bytes of each thread: chunk k // 8 of column n is 8 (k // 8) + n
    cores[:16] = B.T.reshape(8, 2, 8).swapaxes(0, 1).reshape(16, 8)
    lines = {
        "a": loaded(90, 10, 1, 4), "b": loaded(91, 11, 5, 4), "d": stored(92, 12, 11, 4),
        "zeros": " ".join(f"mov.b32 %r{n}, 0;" for n in range(11, 15)), "proxy": "fence.proxy.async.shared::cta;",
        "barrier": "bar.sync 0;", "fence": "wgmma.fence.sync.aligned;", "wait": "wgmma.wait_group.sync.aligned 0;",
        "descriptor": descriptor(
            start_address=BASE >> 4, leading_dimension_byte_offset=8, stride_dimension_byte_offset=16
        ),
    } | changes  # fmt: skip
    d = torch.zeros(128, 4)
    tensors = {"a": torch.from_numpy(a), "b": torch.from_numpy(words(cores, "bf16")), "d": d}
    device = executed(WGMMA.format(**lines), threads=128, shared_bytes=2048, **tensors)
    want = A @ B
    rows = [
        [want[16 * warp : 16 * warp + 16][c_element(lane, i)] for i in range(4)] for warp in range(4) for lane in LANES
    ]
    return device, d.tolist(), rows


def test_wgmma():
    device, got, want = wgmma()
    assert not device.findings, device.findings
    assert got == want


@pytest.mark.parametrize(
    ("missing", "kind"),
    [("proxy", "proxy race"), ("barrier", "race"), ("wait", "register race")],
)
def test_wgmma_needs_what_orders_it(missing, kind):
    device, _, _ = wgmma(**{missing: ""})
    assert kind in device.findings.kinds


def test_wgmma_needs_a_fence_after_its_registers_were_written():
    device, _, _ = wgmma(fence="")
    assert device.findings.kinds == {"register race"}  # of A; the zeros alone would be a note
    device, _, _ = wgmma(zeros="", fence="", d="")
    assert "uninitialised" in device.findings.kinds


def test_wgmma_out_of_bounds():
    device, _, _ = wgmma(descriptor=descriptor(start_address=(BASE + 1920) >> 4, leading_dimension_byte_offset=8))
    assert "out of bounds" in device.findings.kinds
