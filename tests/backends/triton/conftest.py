"""Both kinds of kernels at small sizes, and memory that shows what a kernel forgets to write."""

import warnings

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch):
    """Triton's interpreter multiplies the bits of bf16 as integers. Here it multiplies the numbers that they are."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="triton is made for Linux on x86-64")
    multiply = interpreter.InterpreterBuilder.create_dot

    def decoded(a):
        if not a.dtype.is_bf16():
            return a
        bits = a.data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), interpreter.tl.float32)

    def create_dot(builder, a, b, *rest):
        return multiply(builder, decoded(a), decoded(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


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
        if cell is not None and {"mean", "mean_of_head", "product"} & cell.derived().forward.operations().keys():
            pytest.skip("the kernels of a step a launch have no means, and no products of values of the step")
        monkeypatch.setattr(tiles, "choose", lambda *_: STEPWISE)
    return request.param
