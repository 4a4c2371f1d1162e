"""What the emulator notices of accesses to memory."""

import pytest
import torch

from tests.ptx.assembly import executed

HERE = "mul.wide.u32 %rd1, %r90, 4; add.s64 %rd2, %rd1, %rd90;\n"  # each thread's place in the first tensor
SHARED = "mov.b32 %r30, global_smem; shl.b32 %r31, %r90, 2; add.s32 %r32, %r30, %r31;\n"  # and in shared memory


def floats(n):
    return torch.zeros(n)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("st.global.b32 [%rd2], 0;", None),
        ("st.global.b32 [%rd2 + 4], 0;", "out of bounds"),
        ("st.global.b32 [%rd2 + -8], 0;", "out of bounds"),
        ("ld.global.b32 %r1, [%rd2 + 0x10000000];", "out of bounds"),
        ("ld.global.b32 %r1, [%rd90 + 2];", "misaligned"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd90 + 8];", "misaligned"),
        ("st.global.b32 [%rd90], %r90;", "race"),
        ("st.global.b32 [%rd90], 5;", None),  # the same bits
    ],
)
def test_global_memory(body, kind):
    device = executed(HERE + body.replace("$end:", "\n$end:"), x=floats(32))
    assert device.findings.kinds == ({kind} if kind else set()), device.findings


@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("barrier", ["", "bar.sync 0;", "bar.warp.sync -1;"])
def test_a_barrier_orders_what_two_threads_do(threads, barrier):
    """Each reads what the next has written; the last of a warp what the first of the next warp has."""
    body = f"""{SHARED} st.shared.b32 [%r32], %r90;
        {barrier}
        add.s32 %r1, %r90, 1; rem.u32 %r2, %r1, {threads}; shl.b32 %r3, %r2, 2; add.s32 %r4, %r3, %r30;
        ld.shared.b32 %r5, [%r4]; {HERE} st.global.b32 [%rd2], %r5;"""
    x = torch.zeros(threads, dtype=torch.int32)
    device = executed(body, threads=threads, shared_bytes=4 * threads, x=x)
    assert x.tolist() == [*range(1, threads), 0]
    enough = barrier == "bar.sync 0;" or (threads == 32 and barrier)
    assert device.findings.kinds == (set() if enough or threads == 32 else {"race"})
    kinds = {kind for kind, _ in device.findings.found}
    assert ("same-warp" in kinds) == (not barrier)


@pytest.mark.parametrize("barrier", ["", "bar.sync 0;"])
def test_a_barrier_lies_between_a_read_and_the_next_write(barrier):
    body = f"""{SHARED} st.shared.b32 [%r32], %r90;
        bar.sync 0;
        xor.b32 %r1, %r31, 128; add.s32 %r2, %r1, %r30; ld.shared.b32 %r5, [%r2];
        {barrier}
        st.shared.b32 [%r32], 0;"""
    device = executed(body, threads=64, shared_bytes=256)
    assert device.findings.kinds == (set() if barrier else {"race"}), device.findings


def test_shared_memory_that_nothing_has_written():
    device = executed(f"{SHARED} ld.shared.b32 %r1, [%r32];", shared_bytes=128)
    assert device.findings.kinds == {"uninitialised"}
    device = executed(f"{SHARED} st.shared.b32 [%r32], 0;", shared_bytes=124)
    assert device.findings.kinds == {"out of bounds"}


@pytest.mark.parametrize(
    ("wait", "kinds"),
    [
        ("cp.async.wait_group 0; bar.sync 0;", set()),
        ("cp.async.wait_group 1; bar.sync 0;", {"async race"}),
        ("bar.sync 0;", {"async race"}),
        ("cp.async.wait_group 0;", {"race"}),
    ],
)
def test_a_copy_is_waited_for(wait, kinds):
    """Each thread copies 16 bytes, and reads 16 of the other warp's."""
    body = f"""mul.wide.u32 %rd1, %r90, 16; add.s64 %rd2, %rd1, %rd90;
        {SHARED} shl.b32 %r33, %r90, 4; add.s32 %r34, %r30, %r33;
        cp.async.cg.shared.global [%r34], [%rd2], 16; cp.async.commit_group;
        {wait}
        xor.b32 %r1, %r33, 512; add.s32 %r2, %r1, %r30; ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2];"""
    device = executed(body, threads=64, shared_bytes=1024, x=floats(256))
    assert kinds <= device.findings.kinds
    assert bool(device.findings) == bool(kinds), device.findings


def test_a_copy_of_no_bytes_writes_zeros():
    body = f"""{SHARED} cp.async.ca.shared.global [%r32], [%rd90], 4, 0; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.b32 %r1, [%r32]; {HERE} st.global.b32 [%rd2], %r1;"""
    x = torch.ones(32)
    device = executed(body, shared_bytes=128, x=x)
    assert not device.findings, device.findings
    assert not x.any()


def test_a_barrier_that_some_threads_do_not_reach():
    body = "setp.lt.u32 %p1, %r90, 7;\n@%p1 bra $end;\nbar.sync 0;\n$end:\n"
    assert executed(body).findings.kinds == {"divergence"}
    assert executed("setp.lt.u32 %p1, %r90, 7; @%p1 bar.warp.sync -1;").findings.kinds == {"divergence"}


def test_ctas_race_where_nothing_orders_them():
    body = "mov.u32 %r1, %ctaid.x; st.global.b32 [%rd90], %r1;"
    assert "cta-race" in executed(body, grid=2, x=floats(1)).findings.kinds
    first_writes = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd90], 5;"
    device = executed(f"{first_writes} ld.global.b32 %r2, [%rd90];", grid=2, x=floats(1))
    assert device.findings.kinds == {"cta-race"}
    apart = "mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, 32, %r90;"
    apart += "mul.wide.u32 %rd1, %r2, 4; add.s64 %rd2, %rd1, %rd90; st.global.b32 [%rd2], %r1;"
    assert not executed(apart, grid=2, x=floats(64)).findings
