"""Several programs of one launch at once: atomics, the order of releases and acquires, races without them."""

import pytest
import torch
import triton
import triton.language as tl

from tests.ptx import emulated
from tests.ptx.emulator.grid import Hang
from tests.ptx.processes import on_each_chip


@triton.jit
def rotate_kernel(x_ptr, count_ptr, steps, BLOCK: tl.constexpr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr):
    """x (2, programs, BLOCK). In each step a program takes the block of its neighbour, and adds one to it. Between
    steps all programs wait for all.
    """
    program, programs, k = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    for step in range(steps):
        given = x_ptr + step % 2 * programs * BLOCK
        taken = x_ptr + (step + 1) % 2 * programs * BLOCK
        x = tl.load(given + (program + 1) % programs * BLOCK + k)
        tl.store(taken + program * BLOCK + k, x + 1)
        tl.debug_barrier()
        tl.atomic_add(count_ptr, 1, sem=RELEASE)
        while tl.atomic_add(count_ptr, 0, sem=ACQUIRE) < (step + 1) * programs:
            pass
        tl.debug_barrier()


@triton.jit
def sum_kernel(x_ptr, total_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0))


def rotated(device, *, programs=4, steps=3, release="release", acquire="acquire"):
    """x after the steps, and as it should be."""
    x, count = torch.zeros(2, programs, 64), torch.zeros(1, dtype=torch.int32)
    x[0] = torch.arange(programs).unsqueeze(1) * 100
    want = x[0].roll(-steps, 0) + steps
    rotate_kernel[(programs,)](x, count, steps, 64, release, acquire, num_warps=2)
    return x[steps % 2], want


@on_each_chip
@pytest.mark.parametrize("seed", range(3))
def test_a_grid_barrier_orders_all_programs(chip, seed):
    with emulated(chip, interleave=seed) as device:
        got, want = rotated(device)
    assert torch.equal(got, want)
    assert not device.findings, device.findings
    assert device.counts["atom"] > 0


@pytest.mark.parametrize("orders", [("relaxed", "acquire"), ("release", "relaxed"), ("relaxed", "relaxed")])
def test_a_barrier_without_release_or_acquire_is_noticed(orders):
    with emulated(90, interleave=0) as device:
        rotated(device, release=orders[0], acquire=orders[1])
    assert device.findings.kinds == {"cta-race"}


def test_a_grid_barrier_needs_more_than_one_program_at_a_time():
    with emulated(90) as device, pytest.raises(Hang, match="1 of 1 CTAs"):
        rotated(device)


def test_atomic_additions_race_with_nobody():
    x, total = torch.arange(256.0), torch.zeros(1)
    with emulated(80, interleave=1) as device:
        sum_kernel[(4,)](x, total, 64)
    assert total.item() == x.sum()
    assert not device.findings, device.findings


def without(text):
    """The PTX without the first line that has this text."""

    def change(ptx):
        lines = ptx.split("\n")
        del lines[next(n for n, line in enumerate(lines) if text in line)]
        return "\n".join(lines)

    return change


@pytest.mark.parametrize("fence", ["membar.gl;", "fence.acq_rel.gpu;", "fence.sc.sys;"])
def test_fences_make_relaxed_atomics_release_and_acquire(fence):
    def fenced(ptx):
        ptx = ptx.replace(".gpu.release.add", ".gpu.relaxed.add").replace(".gpu.acquire.b32", ".gpu.relaxed.b32")
        lines = ptx.split("\n")
        for n, line in reversed(list(enumerate(lines))):
            if "red.global" in line:
                lines.insert(n, fence)
            elif "ld.global.gpu.relaxed" in line:
                lines.insert(n + 1, fence)
        return "\n".join(lines)

    with emulated(90, interleave=0, change=fenced) as device:
        got, want = rotated(device)
    assert torch.equal(got, want)
    assert not device.findings, device.findings
    with emulated(90, interleave=0, change=lambda ptx: without(fence)(fenced(ptx))) as device:
        rotated(device)
    assert "cta-race" in device.findings.kinds


def test_a_barrier_that_is_missing_before_a_release_is_noticed():
    with emulated(90, interleave=0) as device:
        rotated(device)
    (ptx,) = device.kernels["rotate_kernel"]
    lines = ptx.split("\n")
    release = next(n for n, line in enumerate(lines) if "red.global" in line)
    before = [n for n, line in enumerate(lines[:release]) if "bar.sync" in line]
    without_barriers = "\n".join(line for n, line in enumerate(lines) if n not in before)
    with emulated(90, interleave=0, change=lambda ptx: without_barriers) as device:
        rotated(device)
    assert "cta-race" in device.findings.kinds
