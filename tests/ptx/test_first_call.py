"""The check of a first call, of kernels as PTX."""

import pytest
import torch

import fastlstm
from fastlstm.backends.triton import device as gpu
from fastlstm.backends.triton import first_call
from tests.ptx import emulated
from tests.ptx.processes import on_each_chip


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    monkeypatch.setattr(gpu, "is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(first_call, "compares", lambda device: True)
    for name, empty in (("_passed", set()), ("failures", {}), ("_reports", {})):
        monkeypatch.setattr(first_call, name, empty)


def failure(name, H, dtype):
    """What a call raises, or None."""
    lstm = fastlstm.LSTM(40, H, backend=name, dtype=dtype)
    try:
        lstm(torch.ones(1, 1, 40, dtype=dtype))[0].sum().backward()
    except RuntimeError as error:
        return str(error)


@pytest.mark.sampled(9)
@on_each_chip
@pytest.mark.parametrize("H", [33, 130])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("triton-ieee", "float32"), ("triton-tf32", "float32"), ("triton", "bfloat16"), ("triton", "float16")],
)
def test_kernels_pass(chip, name, dtype, H):
    with emulated(chip) as device:
        assert failure(name, H, getattr(torch, dtype)) is None
    assert len(device.launches) > 2  # of the check and of the call


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "dtype", "kernel", "was", "becomes", "wrong"),
    [
        ("triton", "bfloat16", "", "tanh.approx.f32", "mov.b32", "the output"),
        ("triton-tf32", "float32", "", "tanh.approx.f32", "mov.b32", "the output"),
        ("triton-ieee", "float32", "", "ex2.approx.f32", "mov.b32", "the output"),
        ("triton", "bfloat16", ".entry backward_kernel(", "sub.f32", "add.f32", "the gradient of x"),
    ],
)
def test_a_kernel_that_computes_something_else_is_reported(name, dtype, kernel, was, becomes, wrong):
    def change(ptx):
        return ptx.replace(was, becomes) if kernel in ptx else ptx

    with emulated(90, change=change):
        assert f"{wrong} differs from the reference" in failure(name, 33, getattr(torch, dtype))
