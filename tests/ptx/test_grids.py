"""Several programs of one launch at once: atomics, the order of releases and acquires, races without them; and layers
whose programs meet after each step.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Run
from fastlstm.backends.triton import launch
from tests.cells import layers as of_cells
from tests.ptx import emulated
from tests.ptx.emulator import grid
from tests.ptx.layers import BOUNDS, DTYPES, PRECISIONS, Case, drawn, forward_results, run
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


@triton.jit
def scale_kernel(x_ptr, factor, times):
    k = tl.arange(0, 32)
    tl.store(x_ptr + k, tl.load(x_ptr + k) * factor * times)


def test_scalar_arguments():
    x = torch.arange(32.0)
    with emulated(80):
        scale_kernel[(1,)](x, 0.375, 3)
    assert torch.equal(x, torch.arange(32.0) * 1.125)


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


def test_a_grid_barrier_needs_more_than_one_program_at_a_time(monkeypatch):
    monkeypatch.setattr(grid, "PATIENCE", 500)
    with emulated(90) as device, pytest.raises(grid.Hang, match="1 of 1 CTAs"):
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


@pytest.fixture
def meeting(monkeypatch):
    """Large layers run in one launch, on a device with so many multiprocessors."""

    def on(multiprocessors):
        monkeypatch.setenv("FASTLSTM_TRITON_GRID", "1")
        monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)

    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    yield on
    torch.use_deterministic_algorithms(False)


# 10 programs, which are two groups of batch rows at H 130, or 9 of all rows in tf32 forward. 300 units are two parts of
# a sum forward and five backward
LAYERS = [
    Case(chip, kind, H, mask, T=3, rows=11 if H == 130 else 8, reverse=bool(mask), grads="cells" if mask else "all")
    for chip in (90, 80)
    for kind, H in (("bf16", 130), ("tf32", 130), ("fp16", 130), ("bf16", 300))
    for mask in ("reset", "")
]
MEETING_ONCE = replace(LAYERS[0], T=2)


def check(case, programs, seeds):
    outputs, gradients = BOUNDS[case.kind]
    for seed in seeds:
        result = run(case, interleave=seed)
        assert [launched.ctas for launched in result.device.launches] == programs
        assert not result.device.findings, result.device.findings
        assert result.outputs < outputs, result.errors
        assert result.gradients < gradients, result.errors


def test_a_layer_whose_programs_meet(meeting):
    meeting(12)
    check(LAYERS[0], [10, 10], [0])


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_whose_programs_meet(case, meeting):
    meeting(12)
    check(case, [9 if case.kind == "tf32" else 10, 10], range(2))


@pytest.mark.slow
def test_a_layer_that_asks_for_its_sums_in_several_turns(meeting):
    """As backward does where most registers have weights: 64 programs, and 16 parts of a sum."""
    meeting(64)
    check(Case(90, "bf16", 1024, T=1, rows=16), [64, 64], [0])


@pytest.mark.slow
@on_each_chip
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "cell", [cells.gru, cells.peephole_lstm, of_cells.gru_decay, of_cells.without_x], ids=lambda cell: cell.name
)
def test_other_cells_whose_programs_meet(cell, masked, chip, meeting):
    meeting(20)
    case = of_cells.Case(cell, T=3, B=9, I=28, H=130, masked=masked, reverse=masked)
    case.layer = case.layer._replace(lengths=None)

    def converted(run, dtype):
        return Run(run.h.to(dtype), *(tuple(a.to(dtype) for a in part) for part in (run.last, run.kept)))

    for kind in ("bf16", "tf32"):
        layer, grads, precision = case.layer.to(DTYPES[kind]), converted(case.grads, DTYPES[kind]), PRECISIONS[kind]
        with emulated(chip, interleave=1) as device:
            found = backend.forward(layer, True, precision)
            gradients = backend.backward(grads, layer, found, case.needs, precision).flat
        exact = layer.to(torch.double)
        truth = reference.forward(exact, True)
        wanted = reference.backward(converted(grads, torch.double), exact, truth, case.needs).flat
        assert len(device.launches) == 2
        assert not device.findings, device.findings
        for got, want, bound in zip((of_cells.flat(found), gradients), (of_cells.flat(truth), wanted), BOUNDS[kind]):
            errors = [of_cells.error(a.double(), b) for a, b in zip(got, want) if a is not None]
            assert max(errors) < bound, errors


def before_the_release(ptx):
    """The PTX without the barriers between the last access to memory and the release."""
    lines = ptx.split("\n")
    release = next(n for n, line in enumerate(lines) if "red.global" in line)
    last = max(n for n, line in enumerate(lines[:release]) if "st.global" in line)
    return "\n".join(line for n, line in enumerate(lines) if not last < n < release or "bar.sync" not in line)


MUTANTS = {
    "no release": lambda ptx: ptx.replace(".gpu.release.add", ".gpu.relaxed.add"),
    "no acquire": lambda ptx: ptx.replace("ld.global.gpu.acquire", "ld.global.gpu.relaxed"),
    "no barrier": before_the_release,
}


@pytest.mark.parametrize("change", MUTANTS)
@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_programs_that_do_not_meet_in_order_are_noticed(direction, change, meeting):
    if direction == "backward":
        forward_results(MEETING_ONCE)  # of kernels whose programs need not meet
    meeting(12)
    result = run(MEETING_ONCE, direction, interleave=0, change=MUTANTS[change])
    assert result.device.findings.kinds == {"cta-race"}


def test_counters_that_an_earlier_launch_has_left_are_noticed(meeting, monkeypatch):
    """Each launch needs zeros."""
    meeting(12)
    used = {}
    monkeypatch.setattr(launch, "arrivals", lambda places, x, made=launch.arrivals: used.setdefault(0, made(places, x)))
    with emulated(90, interleave=0) as device:
        backend.forward(drawn(MEETING_ONCE)[0], True)
        assert not device.findings, device.findings
        backend.forward(drawn(MEETING_ONCE)[0], True)
    assert "cta-race" in device.findings.kinds
