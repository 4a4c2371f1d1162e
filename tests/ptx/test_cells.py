"""The Triton kernels of cells other than the LSTM as PTX, against the reference in float64."""

import itertools

import pytest
import torch

from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Layer, Run
from fastlstm.backends.triton.cells import means_of
from tests.cells.layers import Case, error, flat, gru_decay, normalized_gru, normalized_lstm, of_heads, without_x
from tests.ptx import emulated
from tests.ptx.layers import BOUNDS, DTYPES, PRECISIONS
from tests.ptx.processes import on_each_chip

SIZES = (33, 64, 128, 130)
JUMPING = {"relu", "maximum"}  # where two of their arguments are equal, a gradient jumps
OTHERS = (*(cell for cell in cells.CELLS if cell is not cells.lstm), gru_decay, without_x)


def matrix():
    """Every cell but the LSTM on each chip, then means and heads. Precision, size, masks and whether the input's
    product is fused change from one to the next.
    """
    layers = [(cell, None, 1) for cell in OTHERS]
    layers += [(normalized_lstm, 40, 1), (normalized_gru, 64, 2), (cells.lstm, 160, 4), (cells.gru, 320, 2)]
    layers += [(of_heads, 66, 2)]
    for number, ((cell, H, heads), chip) in enumerate(itertools.product(layers, (80, 90))):
        kind, masked = list(BOUNDS)[(number + number // 8) % 4], number % 3 == 1
        largest = 2 if kind == "ieee" else 3  # of the sizes that one program can hold, as means need
        sizes = SIZES[:largest] if means_of(cell) else SIZES
        H, I = H or sizes[number // 2 % len(sizes)], (28, 40)[number // 3 % 2]
        label = f"{cell.name}-sm_{chip}-{kind}-H{H}x{heads}-I{I}" + "-masked" * masked
        yield pytest.param(cell, chip, kind, H, I, masked, heads, id=label)


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def converted(run, dtype):
    return Run(run.h.to(dtype), *(tuple(a.to(dtype) for a in part) for part in (run.last, run.saved)))


def truth(grads, layer, needs):
    """What the reference returns in float64: outputs and states, and gradients."""
    layer = layer.to(torch.double)
    run = reference.forward(layer, True)
    return flat(run), reference.backward(converted(grads, torch.double), layer, run, needs).flat


def rounded(layer, eps, made):
    """The layer with each number off by up to a part of `eps`."""
    operands = [a if a is None else a.double() for a in layer.tensors[:-2]]
    operands = [a if a is None else a + a * eps * (2 * torch.rand(a.shape, generator=made) - 1) for a in operands]
    return Layer.of(layer.cell, (*operands, layer.lengths, layer.reset), layer.reverse)


def errors(got, want):
    return [error(a.double(), b) for a, b in zip(got, want) if a is not None]


def drawn(cell, kind, H, I, masked, heads):
    """A layer, gradients for what comes out of it, those that are wanted, and the truth.

    Near an equality of what `JUMPING` compares, a rounding decides where a gradient goes. So such a cell gets the first
    numbers whose gradients stay within the bound when each number is off by as much as the kind rounds, in eight draws.
    Where there are many units they have few rows, or hardly any numbers would do.
    """
    jumps = JUMPING & cell.derived().forward.operations().keys()
    eps = torch.finfo({"tf32": torch.float16}.get(kind, DTYPES[kind])).eps
    for seed in range(1000):
        rows, made = 3 if jumps and H > 33 else 9, torch.Generator().manual_seed(seed)
        case = Case(cell, T=2, B=rows, I=I, H=H, masked=masked, reverse=masked, seed=seed, heads=heads)
        layer, grads = case.layer.to(DTYPES[kind]), converted(case.grads, DTYPES[kind])
        exact = truth(grads, layer, case.needs)
        others = (truth(grads, rounded(layer, eps, made), case.needs)[1] for _ in range(8 if jumps else 0))
        if all(max(errors(other, exact[1])) < BOUNDS[kind][1] for other in others):
            return layer, grads, case.needs, exact
    raise AssertionError("no numbers were found that keep apart what a cell compares")


@pytest.mark.sampled(9)
@pytest.mark.parametrize(("cell", "chip", "kind", "H", "I", "masked", "heads"), list(matrix()))
def test_outputs_and_gradients(cell, chip, kind, H, I, masked, heads):
    layer, grads, needs, exact = drawn(cell, kind, H, I, masked, heads)
    with emulated(chip) as device:
        run = backend.forward(layer, True, PRECISIONS[kind])
        found = flat(run), backend.backward(grads, layer, run, needs, PRECISIONS[kind]).flat
    assert not device.findings, device.findings
    for got, want, bound in zip(found, exact, BOUNDS[kind]):
        assert max(errors(got, want)) < bound, errors(got, want)


@on_each_chip
@pytest.mark.parametrize(
    ("cell", "kind", "H", "heads"),
    [(normalized_gru, "bf16", 33, 1), (cells.lstm, "tf32", 64, 2), (of_heads, "tf32", 66, 2)],
    ids=["means", "heads", "means of heads"],
)
def test_means_and_heads(cell, chip, kind, H, heads):
    test_outputs_and_gradients(cell, chip, kind, H, 28, False, heads)


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
