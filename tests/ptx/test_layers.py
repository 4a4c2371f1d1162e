"""The Triton backend's kernels as PTX, against the reference in float64."""

import pytest
import torch

from tests.ptx.layers import matrix, run


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", list(matrix()), ids=str)
def test_outputs_and_gradients(case):
    result = run(case)
    assert not result.faults(case.kind), (result.errors, result.device.findings)
