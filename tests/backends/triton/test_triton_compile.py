"""The Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100: what can be held to without a GPU.

After a change that is meant, write the budgets anew, for each chip and with either Triton:

    python -m tests.helpers.triton_resources 9.0 > tests/backends/triton/budgets/sm_90-3.9.jsonl
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fastlstm.backends.triton import tiles
from fastlstm.cells.spec import by_key

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is made for Linux on x86-64", allow_module_level=True)

from fastlstm.backends.triton.cells import kernel, means_of
from tests.helpers import ROOT, interpreter
from tests.helpers.triton_resources import DTYPES, Case, cases

BUDGETS = Path(__file__).parent / "budgets"
TRITON = ".".join(metadata.version("triton").split(".")[:2])
COUNTED = "3.9"  # the Triton whose resident kernels take wgmma
# Registers that do not suffice. More warps spill more, or have no more that they could have.
SPILLED = {
    ("sm_80", "3.6", "backward-tf32-H100-lengths-cells"): 2,
    ("sm_80", "3.6", "backward-tf32-H128-lengths-cells"): 4,
    ("sm_80", "3.6", "backward-tf32-H100-reset-cells"): 10,
    ("sm_80", "3.6", "backward-tf32-H100-lengths-reset-cells"): 24,
    ("sm_90", "3.6", "backward-tf32-H100-lengths-reset-cells"): 4,
    ("sm_100", "3.6", "forward-bf16-H128-lengths-reset"): 4,
    ("sm_100", "3.6", "forward-bf16-H100-I28-lengths-reset"): 6,
    ("sm_80", "3.6", "normalized_gru-backward-bf16-H100-lengths-reset-cells"): 14,
    ("sm_90", "3.6", "normalized_gru-backward-bf16-H100-lengths-reset-cells"): 12,
    ("sm_80", "3.6", "backward-ieee-H1024x4"): 2,
    ("sm_90", "3.6", "backward-ieee-H1024x4"): 2,
    ("sm_80", "3.7", "forward-tf32-H100-lengths-reset"): 10,
    ("sm_80", "3.7", "backward-tf32-H100-lengths-cells"): 19,
    ("sm_80", "3.7", "backward-tf32-H100-reset-cells"): 18,
    ("sm_80", "3.7", "backward-tf32-H100-lengths-reset-cells"): 36,
    ("sm_90", "3.7", "backward-bf16-H32"): 4,
    ("sm_90", "3.7", "backward-bf16-H40-lengths-cells"): 2,
    ("sm_90", "3.7", "backward-fp16-H40-lengths-cells"): 4,
    ("sm_90", "3.7", "backward-tf32-H100-lengths-reset-cells"): 6,
    ("sm_100", "3.7", "forward-bf16-H128-lengths-reset"): 6,
    ("sm_100", "3.7", "forward-bf16-H100-I28-lengths-reset"): 24,
    ("sm_90", "3.9", "backward-ieee-H40-lengths-cells"): 10,
    ("sm_90", "3.9", "backward-ieee-H40-reset-cells"): 30,
    ("sm_90", "3.9", "backward-ieee-H40-lengths-reset-cells"): 46,
    ("sm_90", "3.9", "backward-ieee-H64-reset-cells"): 4,
    ("sm_90", "3.9", "backward-ieee-H64-lengths-reset-cells"): 16,
    ("sm_90", "3.9", "slstm-backward-ieee-H64"): 20,
    ("sm_100", "3.9", "forward-bf16-H128-I28-lengths"): 2,
    ("sm_100", "3.9", "forward-bf16-H100-I28-lengths-reset"): 20,
    ("sm_100", "3.9", "backward-ieee-H64-lengths-reset-cells"): 9,
    ("sm_100", "3.9", "slstm-backward-ieee-H64"): 3,
}
# Of resident kernels with Triton 3.8, torch 2.14's
SPILLED_BY_3_8 = {
    ("sm_80", "forward"): 30,
    ("sm_80", "backward"): 24,
    ("sm_90", "forward"): 58,
    ("sm_90", "backward"): 190,
    ("sm_100", "forward"): 37,
    ("sm_100", "backward"): 5,
}
CHIPS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
FAST = [  # each direction, precision, kind of kernel and mask once, other cells, and heads
    "forward-bf16-H128-I28", "backward-bf16-H128", "forward-ieee-H64", "backward-tf32-H128", "forward-bf16-H1024",
    "backward-bf16-H1024", "backward-bf16-H128-lengths-reset-cells", "gru-forward-bf16-H128",
    "normalized_gru-backward-bf16-H128", "backward-bf16-H512x4",
]  # fmt: skip


def recorded(chip, version):
    rows = map(json.loads, (BUDGETS / f"{chip}-{version}.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["case"]: row for row in rows}


def compiled(chip, names=()):
    """In a process of its own: this one may run Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    arguments = ".".join(map(str, CHIPS[chip])), *names
    done = interpreter.run_module("tests.helpers.triton_resources", *arguments, environment=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(names or list(cases()))
    return rows


def check(chip, rows):
    limit, counted = tiles.SHARED_KB[CHIPS[chip]] * 1024, (BUDGETS / f"{chip}-{TRITON}.jsonl").exists()
    budget = recorded(chip, TRITON) if counted else {}
    for row in rows:
        most = SPILLED.get((chip, TRITON, row["case"]), 0)
        if row["case"].startswith("normalized_lstm"):  # whose params and their gradients fill all registers
            most = budget[row["case"]]["spilled"] if counted else row["spilled"]
        if TRITON == "3.8" and row["kernel"] == "resident":
            most = SPILLED_BY_3_8.get((chip, row["case"].split("-")[0]), 0)
        assert row["spilled"] <= most, row
        assert row["shared_bytes"] <= limit, row
        assert row["mma"] > 0 or "ind_rnn" in row["case"], row  # which has no weight_hh
        if row["kernel"] == "resident" and "ieee" not in row["case"]:
            assert row["streamed"] == 0, row  # weights stay in registers
    for row in rows:
        if row["case"] not in budget:
            continue  # not recorded for every chip and version
        assert row["instructions"] <= 1.05 * budget[row["case"]]["instructions"], row
        assert row["barriers"] <= budget[row["case"]]["barriers"], row
        assert row["registers"] <= budget[row["case"]]["registers"] + 8, row  # at 255 a spill is near
        check_ptx(chip, row)
        few = "H32" in row["case"] or row["kernel"] == "stepwise"  # 32 units a program, and wgmma's M is 64
        if chip == "sm_90" and TRITON == COUNTED and (row["case"].startswith("forward") or not few):
            assert row["wgmma"] == row["mma"], row  # 3.6 takes mma.sync at 8 batch rows


def check_ptx(chip, row):
    """What a thread and a warp are meant to do, and nothing twice, in the whole kernel's PTX."""
    case = next(case for case in cases() if str(case) == row["case"])
    precision, ptx, warps = DTYPES[case.kind], row["ptx"], row["warps"]
    cell = kernel(by_key(case.cell), precision == "ieee", case.H if means_of(by_key(case.cell)) else 0)
    tile = tiles.choose(case.H // case.heads, precision, CHIPS[chip], cell.gates)
    resident, exact = isinstance(tile, tiles.Resident), precision == "ieee"
    if case.cell == "lstm":
        units = (tile.P if resident else tile.units) * tile.block_b // (32 * warps)  # of a thread
        # forward four gates and tanh of the cell state, which may be had again where h lies otherwise; backward that
        least, most = (5 * units, 6 * units) if case.direction == "forward" else (units, units)
        assert ptx["tanh.approx"] == 0 if exact else least <= ptx["tanh.approx"] <= most, row
        assert least <= ptx["ex2.approx"] == ptx["div"] <= most if exact else ptx["ex2.approx"] == ptx["div"] == 0, row
    if not resident:
        assert ptx["cp.async"] > 0, row
        return
    assert ptx["cp.async"] == 0, row
    # (M, K) weights by 8 rows, before the loop and in it: 16 x 16 weights a warp and product, tcgen05 up to 128 x 16
    gates = cell.gates if case.direction == "forward" else min(cell.gates, tile.backward_gates)
    M, K = (gates * tile.P, tile.P) if case.direction == "forward" else (tile.P, gates * tile.P)
    tiles_of_m = M // (min(M, 128) if ptx["tcgen05.mma"] else 16 * warps)
    products = tiles_of_m * (K // 16) * (3 if exact else 1) * (cell.of_h // gates)
    if case.I:
        padded = tiles.padded_input(case.I, tile.P, precision, CHIPS[chip])
        products += tiles_of_m * (padded // 16) * (by_key(case.cell).gates_of_x // gates)
    assert ptx["wgmma"] + ptx["mma.sync"] + ptx["tcgen05.mma"] == 2 * products, row


def test_an_input_is_fused_where_both_weights_have_room():
    """Triton 3.8 has them in shared memory at once: 164 KB of the 163 that an A100 would give."""
    for chip in ((8, 0), (8, 7)):
        assert [tiles.padded_input(I, 128, "native", chip) for I in (1, 16, 17, 32)] == [16, 16, 0, 0]
    assert [tiles.padded_input(I, 128, "native", (9, 0)) for I in (1, 17, 32, 33)] == [16, 32, 32, 0]
    assert tiles.padded_input(32, 64, "native", (8, 6)) == 32


def test_kernels_on_an_h100():
    check("sm_90", compiled("sm_90", FAST))


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel(chip):
    check(chip, compiled(chip))


PREDICTED = {  # a row of docs/gpu.md's table, and the case that it is about
    "forward bf16 H 32": Case("forward", "bf16", 32),
    "forward bf16 H 64": Case("forward", "bf16", 64),
    "forward bf16 H 128": Case("forward", "bf16", 128),
    "the same, I 28 fused": Case("forward", "bf16", 128, I=28),
    "the same, with lengths, not fused": Case("forward", "bf16", 128, lengths=True),
    "the same, with lengths and resets": Case("forward", "bf16", 128, lengths=True, reset=True),
    "forward tf32 H 128": Case("forward", "tf32", 128),
    "forward ieee H 64": Case("forward", "ieee", 64),
    "backward bf16 H 64": Case("backward", "bf16", 64),
    "backward bf16 H 128": Case("backward", "bf16", 128),
    "the same, with lengths, resets and a gradient of every cell state": Case(
        "backward", "bf16", 128, lengths=True, reset=True, cells=True
    ),
    "backward tf32 H 128": Case("backward", "tf32", 128),
    "backward ieee H 64": Case("backward", "ieee", 64),
}


def test_the_documents_counts_are_the_recorded_ones():
    text, found = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8"), []
    for line in re.findall(r"^\| (?:forward|backward|the same).*$", text, re.MULTILINE):
        name, *numbers, _ = (part.strip() for part in line.strip("|").split("|"))
        found.append((name, [int(number) for number in numbers]))
    columns, expected = ("warps", "registers", "shared_bytes", "instructions", "mma", "barriers"), []
    for version in ("3.9", "3.6"):
        budget = recorded("sm_90", version)
        for name, case in PREDICTED.items():
            warps, registers, shared, *rest = (budget[str(case)][column] for column in columns)
            expected.append((name, [warps, registers, shared // 1024, *rest]))
    assert found == expected


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
            triton.backward(Run(run.h, (state, state), run.kept[:1]), layer, run, needs, "ieee")
        odd = torch.randn(x.numel() + 1, dtype=dtype)[1:].view_as(x)
        masks = torch.full((B + 1,), T)[1:], torch.zeros(T * B + 1, dtype=torch.bool)[1:].view(T, B)
        layer = Layer(odd, weights, (shifted, shifted), *masks, False, cells.lstm)
        run = triton.forward(layer, True, "ieee")
        dh = torch.randn(run.h.numel() + 1, dtype=dtype)[1:].view_as(run.h)
        triton.backward(Run(dh, (shifted, shifted), run.kept[:1]), layer, run, needs, "ieee")
print(*sorted(name for name, _ in variants))
"""


def test_a_new_length_or_batch_compiles_nothing_new():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", VARIANTS], capture_output=True, text=True, env=environment, cwd=ROOT)
    # in 16 bits and in float32 one each, resident and stepwise; weights are packed by row and by column
    expected = 4 * ["backward_kernel"] + 4 * ["forward_kernel"] + 2 * ["pack_kernel"]
    assert done.stdout.split() == expected, done.stderr
