"""What orders the reads and writes of a `wgmma`, and what is found where it is missing.

Where each element of a fragment lies, and what comes out, is tested by the layers: with any of it wrong their numbers
are.
"""

import pytest
import torch

from tests.ptx.assembly import executed
from tests.ptx.emulator.shared import BASE
from tests.ptx.emulator.wgmma import FIELDS

# D = A B for A (64, 16) in registers of four warps and B (16, 8) in shared memory, without a swizzle
WGMMA = """
        mul.wide.u32 %rd1, %r90, 16; add.s64 %rd2, %rd1, %rd90; add.s64 %rd3, %rd1, %rd91;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd2];
        mov.b32 %r30, global_smem; shl.b32 %r31, %r90, 4; add.s32 %r32, %r30, %r31;
        st.shared.v4.b32 [%r32], {{%r1, %r2, %r3, %r4}};
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


def descriptor(**fields):
    return sum(value << FIELDS[name][0] for name, value in fields.items())


def found(**changes):
    """The kinds of findings, where `changes` replace lines."""
    lines = {
        "zeros": " ".join(f"mov.b32 %r{n}, 0;" for n in range(11, 15)), "proxy": "fence.proxy.async.shared::cta;",
        "barrier": "bar.sync 0;", "fence": "wgmma.fence.sync.aligned;", "wait": "wgmma.wait_group.sync.aligned 0;",
        "d": "st.global.v4.b32 [%rd3], {%r11, %r12, %r13, %r14};",
        "descriptor": descriptor(
            start_address=BASE >> 4, leading_dimension_byte_offset=8, stride_dimension_byte_offset=16
        ),
    } | changes  # fmt: skip
    tensors = {"a": torch.ones(128, 4), "d": torch.zeros(128, 4)}
    return executed(WGMMA.format(**lines), threads=128, shared_bytes=2048, **tensors).findings.kinds


def test_nothing_is_found_where_all_is_in_order():
    assert found() == set()


@pytest.mark.parametrize(
    ("missing", "kind"),
    [("proxy", "proxy race"), ("barrier", "race"), ("wait", "register race")],
)
def test_wgmma_needs_what_orders_it(missing, kind):
    assert kind in found(**{missing: ""})


def test_wgmma_needs_a_fence_after_its_registers_were_written():
    assert found(fence="") == {"register race"}  # of A; the zeros alone would be a note


def test_wgmma_out_of_bounds():
    place = descriptor(start_address=(BASE + 1920) >> 4, leading_dimension_byte_offset=8)
    assert "out of bounds" in found(descriptor=place)
