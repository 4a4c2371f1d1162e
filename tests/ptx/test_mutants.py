"""Kernels without one of the barriers, fences and waits that order their accesses: each has to be missed."""

import re
from itertools import groupby

import pytest
import torch

from tests.ptx.emulator.findings import Fault
from tests.ptx.emulator.operands import Unsupported
from tests.ptx.layers import Case, run

ORDERING = r"\s*(bar\.sync|fence\.proxy|cp\.async\.wait_group|wgmma\.fence|wgmma\.wait_group)"
ACCESS = r"\s*(@!?%p\d+\s+)?(ld|st|cp|mma|wgmma\.mma_async|ldmatrix|stmatrix|bra)\b"


def orderings(text):
    """The lines of PTX that order accesses. Those that follow each other without an access between are one."""
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if re.match(f"{ORDERING}|{ACCESS}", line)]
    for kind, same in groupby(lines, lambda entry: found[1] if (found := re.match(ORDERING, entry[1])) else None):
        if kind is not None:
            yield [n for n, _ in same]


@pytest.mark.parametrize("chip", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_nothing_that_orders_accesses_can_be_left_out(chip, request):
    """Of kernels in 16 bits with lengths every fourth line that orders accesses, and for sm_90 each."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    case, unnoticed = Case(chip, "fp16", 33, mask="lengths"), []
    kernels = run(case).kernels
    assert set(kernels) == {"forward_kernel", "backward_kernel"}
    for name, (text,) in kernels.items():
        tried = list(orderings(text))[:: 4 if chip == 80 else 1]
        assert tried
        for lines in tried:
            try:
                device = run(case, name == "backward_kernel", left_out={name: lines}, stops=True)
                if not device.findings.found:
                    unnoticed.append((name, lines))
            except (Fault, Unsupported):  # what is unsupported is what right code does not do
                pass
    assert unnoticed == []
