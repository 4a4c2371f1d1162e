"""Kernels without one of the barriers, fences and waits that order their accesses: each has to be missed."""

import pytest
import torch

from tests.ptx.mutants import CASES, mutants


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def unnoticed(tried):
    assert tried
    return [mutant for mutant in tried if not mutant.noticed() and not mutant.idle]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_that_orders_accesses_can_be_left_out(case):
    assert unnoticed(list(mutants(case))) == []


def test_some_of_the_smallest_kernels_barriers():
    """Every fourth, of a kernel in 16 bits with lengths."""
    tried = list(mutants(CASES[1]))
    assert {mutant.kernel for mutant in tried} == {"forward_kernel", "backward_kernel"}
    assert unnoticed(tried[::4]) == []
