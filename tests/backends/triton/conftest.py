"""Both kinds of kernels at small sizes, and memory that shows what a kernel forgets to write."""

import warnings

import pytest
import torch


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN. The interpreter warns of NaN and infinity."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["resident", "stepwise"])
def kernels(request, monkeypatch, poisoned):
    """Both kinds of kernels at small sizes, where the interpreter is fast."""
    if request.param == "stepwise":
        from fastlstm.backends.triton import tiles
        from tests.backends.triton.shared import STEPWISE

        cell = request.node.callspec.params.get("cell")
        if cell is not None and "mean" in cell.derived().forward.operations():
            pytest.skip("the kernels of a step a launch have no means")
        monkeypatch.setattr(tiles, "choose", lambda *_: STEPWISE)
    return request.param
