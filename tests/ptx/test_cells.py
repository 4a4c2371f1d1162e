"""The Triton kernels of cells other than the LSTM as PTX, against the reference in float64."""

import pytest
import torch

from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Run
from tests.cells.layers import Case, error, flat
from tests.ptx import emulated
from tests.ptx.layers import BOUNDS, DTYPES, PRECISIONS
from tests.ptx.processes import on_each_chip

of_cells = pytest.mark.parametrize("cell", [cells.gru, cells.peephole_lstm, cells.ind_rnn], ids=lambda cell: cell.name)


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def converted(run, dtype):
    return Run(run.h.to(dtype), *(tuple(a.to(dtype) for a in part) for part in (run.last, run.kept)))


@pytest.mark.sampled(131)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("I", [28, 40])
@pytest.mark.parametrize("H", [33, 64, 128, 130])
@pytest.mark.parametrize("kind", BOUNDS)
@on_each_chip
@of_cells
def test_outputs_and_gradients(cell, chip, kind, H, I, masked):
    case = Case(cell, T=2, B=9, I=I, H=H, masked=masked, reverse=masked)
    layer, grads, precision = case.layer.to(DTYPES[kind]), converted(case.grads, DTYPES[kind]), PRECISIONS[kind]
    with emulated(chip) as device:
        run = backend.forward(layer, True, precision)
        found = flat(run), backend.backward(grads, layer, run, case.needs, precision).flat
    exact = layer.to(torch.double)
    run = reference.forward(exact, True)
    truth = flat(run), reference.backward(converted(grads, torch.double), exact, run, case.needs).flat
    assert not device.findings, device.findings
    for got, want, bound in zip(found, truth, BOUNDS[kind]):
        errors = [error(a.double(), b) for a, b in zip(got, want) if a is not None]
        assert max(errors) < bound, errors


def per_step(cell, chip, H, I=40):
    """What one more step of a bf16 layer with 8 rows adds to the counts of a kernel, by the kernel's name."""
    counts = []
    for T in (2, 3):
        case = Case(cell, T=T, B=8, I=I, H=H)
        layer, grads = case.layer.to(torch.bfloat16), converted(case.grads, torch.bfloat16)
        with emulated(chip) as device:
            backend.backward(grads, layer, backend.forward(layer, True), case.needs)
        counts.append({launched.kernel: launched.counts for launched in device.launches})
    fewer, more = counts
    return {name: {key: more[name][key] - fewer[name][key] for key in more[name]} for name in more}


def instructions(counts):
    """Traffic has names of two words, and a class of instructions of one."""
    return sum(count for name, count in counts.items() if " " not in name)


def test_a_step_moves_no_more_than_it_must_and_the_gru_does_less():
    """8 rows of 128 units on sm_90: each kernel has 8 warps."""
    lstm, gru = (per_step(cell, 90, 128) for cell in (cells.lstm, cells.gru))
    for counts in (*lstm.values(), *gru.values()):
        for access in ("ld.global", "st.global"):
            assert counts[f"{access} sectors"] <= 1.25 * counts[f"{access} sectors at best"], counts
    for name, counts in gru.items():
        assert instructions(counts) < instructions(lstm[name]), name


def test_no_two_threads_of_a_warp_want_one_bank_backward():
    counts = per_step(cells.lstm, 80, 128)["backward_kernel"]
    assert counts["st.shared conflicts"] == counts["ld.shared conflicts"] == 0, counts
