"""The Triton backend's kernels as PTX: what they read and write, their races, and their numbers, in float64.

A process either interprets Triton's kernels or compiles them, from Triton's import on. The suite's own process
interprets them unless there is a GPU, and `test_emulated.py` runs this file in others.
"""

import itertools

import pytest
import torch

from fastlstm import cells
from fastlstm.backends.triton.cells import means_of
from tests.cells.layers import gru_decay
from tests.helpers.rnn import of_heads, without_x
from tests.ptx.layers import BOUNDS, Case, run

MASKS = ("", "lengths", "reset", "lengths+reset")


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def matrix():
    """The LSTM on two chips in each precision at three sizes, which take other tiles. Then other cells, means, heads
    and products. The rest changes from layer to layer, so that all values meet. Then chips of little shared memory, and
    programs of 16 rows.
    """
    for number, (chip, kind, H) in enumerate(itertools.product((80, 90), BOUNDS, (33, 128, 130))):
        yield Case(
            chip, kind, H, cells.lstm, MASKS[number % 4], T=min((5, 2, 5, 1, 2)[number % 5], 5 if H <= 128 else 2),
            B=(3, 8, 11)[number // 2 % 3], G=(0, 0, 2)[number % 3 - 1], I=(28, 40, 5, 16)[(number + number // 8) % 4],
            reverse=number % 7 in (1, 3, 4), bias=number % 5 != 3, inner=number // 2 % 2 == 0,
        )  # fmt: skip
    others = [(cell, None, 1) for cell in (*cells.CELLS[1:], gru_decay, without_x) if not cell.products]
    others += [(cells.dreamer_gru, 64, 2), (cells.lstm, 160, 4), (cells.gru, 320, 2)]
    others += [(of_heads, 66, 2), *((cell, None, 1) for cell in cells.CELLS if cell.products)]
    for number, ((cell, H, heads), chip) in enumerate(itertools.product(others, (80, 90))):
        kind, mask = list(BOUNDS)[(number + number // 8) % 4], MASKS[3 if number % 3 == 1 else 0]
        # one program holds these
        sizes = (33, 64, 128, 130)[: 2 if cell.products else 4 if not means_of(cell) else 2 if kind == "ieee" else 3]
        H, I = H or sizes[number // 2 % len(sizes)], (28, 40)[number // 3 % 2]
        yield Case(chip, kind, H, cell, mask, I=I, reverse=bool(mask), heads=heads)
    for chip, kind in ((86, "bf16"), (86, "tf32"), (120, "fp16"), (120, "tf32")):
        yield Case(chip, kind, 100, mask="lengths+reset", I=28)
    for chip, kind, H, mask in ((80, "bf16", 128, ""), (90, "fp16", 128, ""), (90, "tf32", 64, "lengths")):
        yield Case(chip, kind, H, mask=mask, I=28, B=19, multiprocessors=1)


def marked(case):
    """`lem` adds a product to a gradient, which Triton makes the product's accumulator. LLVM moves its last write
    behind wgmma.fence, which PTX leaves undefined. ptxas runs such products one after the other.
    """
    is_late = (case.cell, case.chip, case.kind) == (cells.lem, 90, "fp16")
    return pytest.param(case, marks=pytest.mark.xfail(reason="writes after wgmma.fence")) if is_late else case


@pytest.mark.sampled(11)
@pytest.mark.parametrize("case", [marked(case) for case in matrix()], ids=str)
def test_nothing_is_found(case):
    device = run(case)
    assert not device.findings, device.findings
