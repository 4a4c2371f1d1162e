"""The Triton backend's kernels as PTX for sm_80 and sm_90, against the reference in float64."""

import pytest
import torch

from tests.ptx.layers import BOUNDS, matrix, run


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.sampled(23)
@pytest.mark.parametrize("case", list(matrix()), ids=str)
def test_outputs_and_gradients(case):
    result = run(case)
    outputs, gradients = BOUNDS[case.kind]
    assert not result.device.findings, result.device.findings
    assert result.outputs < outputs, result.errors
    assert result.gradients < gradients, result.errors
