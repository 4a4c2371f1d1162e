"""The Triton kernels compiled ahead of time, for chips that need not be there: what can be held to without a GPU.

budgets.csv has registers, spills, instructions and barriers of each kernel on each chip. After a change that is meant,
one command writes it anew: `python -m tests.helpers.triton_resources > tests/backends/triton/budgets.csv`.
"""

import csv
import json
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fastlstm.backends.triton import device, tiles

pytest.importorskip("triton", reason="triton is made for Linux on x86-64")

from tests.helpers import ROOT, interpreter
from tests.helpers.triton_resources import CHIPS, COUNTS, cases

CASES = {str(case): case for case in cases()}
COUNTED = metadata.version("triton").startswith("3.9")  # the Triton that the table is of
# Registers that do not suffice: more warps spill more, or have no more that they could have.
# The LSTM of layer norms has three of them and 14 params, whose gradients fill all registers.
SPILLED = {
    "forward-tf32-H1024x4": {"8.6": 2, "8.9": 2},
    "backward-tf32-H100-lengths-reset-cells": {"8.6": 2, "8.9": 2, "12.0": 7},
    "backward-tf32-H100-lengths": {"12.0": 2},
    "backward-ieee-H40-lengths-reset-cells": {"9.0": 38},
    "layer_norm_lstm-forward-bf16-H128": {"8.0": 10, "8.6": 10, "8.9": 10, "9.0": 14, "12.0": 20},
    "layer_norm_lstm-backward-bf16-H128": {
        "8.0": 250, "8.6": 246, "8.9": 246, "9.0": 313, "10.0": 117, "12.0": 129,
    },
    "layer_norm_lstm-backward-tf32-H64": {"8.0": 167, "8.6": 124, "8.9": 124, "9.0": 122, "10.0": 21, "12.0": 73},
}  # fmt: skip
FAST = [  # each direction, precision, kind of kernel and mask once, another cell, means, and heads
    "forward-bf16-H128-I28", "backward-bf16-H128", "forward-ieee-H64", "backward-tf32-H128", "backward-bf16-H1024",
    "backward-bf16-H100-lengths-reset-cells", "gru-forward-bf16-H128", "dreamer_gru-backward-bf16-H128",
    "forward-bf16-H512x4",
]  # fmt: skip


def budgets():
    """The counts by case and chip."""
    with (Path(__file__).parent / "budgets.csv").open(encoding="utf-8", newline="") as file:
        rows = {row.pop("case"): row for row in csv.DictReader(file)}
    assert all(row.pop("7.5") == "refused" for row in rows.values())
    return {
        case: {chip: dict(zip(COUNTS, map(int, counts.split()), strict=True)) for chip, counts in row.items()}
        for case, row in rows.items()
    }


def test_the_table_has_every_kernel_and_hardly_any_spills(monkeypatch):
    found = budgets()
    assert list(found) == list(CASES)
    assert all(list(row) == list(CHIPS) for row in found.values())
    spilled = {
        case: {chip: counts["spilled"] for chip, counts in row.items() if counts["spilled"]}
        for case, row in found.items()
    }
    assert {case: row for case, row in spilled.items() if row} == SPILLED
    monkeypatch.setattr(device, "capability", lambda _: (7, 5))
    assert "needs compute capability 8.0, got 7.5" in device.supports(torch.device("cuda"), torch.float16)


def test_rows_of_a_program_follow_the_waves():
    """An A100 has 108 multiprocessors, each of which takes one program of 128 units."""
    tile = tiles.choose(128, "native", (8, 0))

    def rows(B, programs=1, precision="native", masked=False, multiprocessors=108):
        return tiles.with_rows(tile, precision, (8, 0), masked, B, programs, multiprocessors).block_b

    assert [rows(B) for B in (0, 1, 864, 865, 1728, 1729, 2593)] == [8, 8, 8, 16, 16, 16, 16]
    assert [rows(432, programs) for programs in (1, 2, 3)] == [8, 8, 16]
    assert rows(865, precision="tf32") == rows(865, masked=True) == rows(865, multiprocessors=132) == 8


def test_an_input_is_fused_where_both_weights_have_room():
    """Triton 3.8 has them in shared memory at once: 164 KB of the 163 that an A100 would give."""
    for chip in ((8, 0), (8, 7)):
        assert [tiles.padded_input(I, 128, "native", chip) for I in (1, 16, 17, 32)] == [16, 16, 0, 0]
    assert [tiles.padded_input(I, 128, "native", (9, 0)) for I in (1, 17, 32, 33)] == [16, 32, 32, 0]
    assert tiles.padded_input(32, 64, "native", (8, 6)) == 32


@pytest.mark.parametrize("chip", [pytest.param(chip, marks=[pytest.mark.slow] * (chip != "9.0")) for chip in CHIPS])
def test_kernels(chip):
    check(chip, compiled(chip, FAST))


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel(chip):
    check(chip, compiled(chip))


def compiled(chip, names=()):
    """In a process of its own: this one may run Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = interpreter.run_module(
        "tests.helpers.triton_resources", chip, *names, environment=environment, cwd=ROOT, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(names or CASES)
    return rows


def check(chip, rows):
    budget, capability = budgets(), tuple(map(int, chip.split(".")))
    for row in rows:
        most = budget[row["case"]][chip]
        assert row["shared_bytes"] <= tiles.SHARED_KB.get(capability, 99) * 1024, row
        assert row["mma"] > 0, row
        if capability < (10, 0) and row["kernel"] == "resident" and "ieee" not in row["case"]:
            assert row["streamed"] == 0, row  # weights stay in registers
        if COUNTED:
            assert row["spilled"] <= most["spilled"], row
            assert row["instructions"] <= 1.05 * most["instructions"], row
            assert row["barriers"] <= most["barriers"], row
            assert row["registers"] <= most["registers"] + 8, row  # at 255 a spill is near


VARIANTS = """
import itertools
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
from fastlstm.backends import triton
from fastlstm import cells
from fastlstm.backends.base import Gradients, Layer, Run

target, variants = make_backend(GPUTarget("cuda", 90, 32)), set()

def run(kernel, *args, grid, warmup, **options):  # what decides whether a launch compiles
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, target)
    variants.add((kernel.__name__, str(binder(*args, **options)[1])))

jit.JITFunction.run = run
needs = Gradients.of(cells.lstm, [True] * 7)
for T, B in [(1, 1), (2, 2), (3, 5), (7, 16), (16, 3), (16, 16), (40, 33)]:
    for H, dtype in itertools.product((33, 200), (torch.float16, torch.float32)):
        x, state = torch.randn(T, B, 28, dtype=dtype), torch.randn(B, H, dtype=dtype)
        shifted = torch.randn(B * H + 1, dtype=dtype)[1:].view(B, H)  # as a layer's states among those of many
        weights = torch.randn(4 * H, 28, dtype=dtype), torch.randn(4 * H, H, dtype=dtype), None, None
        masks = torch.full((B,), T), torch.zeros(T, B, dtype=torch.bool)
        for turned, reverse in ((x, False), (x, True), (x.transpose(0, 1).contiguous().transpose(0, 1), False)):
            layer = Layer(turned, weights, (state, state), *masks, reverse, cells.lstm)
            run = triton.forward(layer, True, "ieee")
            triton.backward(Run(run.h, (state, state), run.saved[:1]), layer, run, needs, "ieee")
        odd = torch.randn(x.numel() + 1, dtype=dtype)[1:].view_as(x)
        masks = torch.full((B + 1,), T)[1:], torch.zeros(T * B + 1, dtype=torch.bool)[1:].view(T, B)
        layer = Layer(odd, weights, (shifted, shifted), *masks, False, cells.lstm)
        run = triton.forward(layer, True, "ieee")
        dh = torch.randn(run.h.numel() + 1, dtype=dtype)[1:].view_as(run.h)
        triton.backward(Run(dh, (shifted, shifted), run.saved[:1]), layer, run, needs, "ieee")
print(*sorted(name for name, _ in variants))
"""


def test_a_new_length_or_batch_compiles_nothing_new():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = interpreter.run(VARIANTS, environment=environment, cwd=ROOT)
    # in 16 bits and in float32 one each, resident and stepwise; weights are packed by row and by column
    expected = 4 * ["backward_kernel"] + 4 * ["forward_kernel"] + 2 * ["pack_kernel"]
    assert done.stdout.split() == expected, done.stderr
