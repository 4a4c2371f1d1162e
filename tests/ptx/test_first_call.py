"""The check of a first call, of kernels as PTX."""

import warnings

import pytest
import torch

import fastlstm
from fastlstm.backends import triton as backend
from fastlstm.backends.triton import first_call
from tests.ptx import emulated
from tests.ptx.processes import on_each_chip


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    monkeypatch.setattr(first_call, "applies", lambda device: True)
    monkeypatch.setattr(first_call, "_checked", set())
    monkeypatch.setattr(backend, "failures", {})


def run(name, H, dtype=torch.float32):
    lstm = fastlstm.LSTM(40, H, backend=name, dtype=dtype)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            lstm(torch.ones(1, 1, 40, dtype=dtype))[0].sum().backward()
            failure = None
        except RuntimeError as error:
            failure = str(error)
    reports = [str(warning.message) for warning in found if "the check of its first call" in str(warning.message)]
    return reports, failure


@pytest.mark.sampled(9)
@on_each_chip
@pytest.mark.parametrize("H", [33, 130])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("triton-ieee", "float32"), ("triton-tf32", "float32"), ("triton", "bfloat16"), ("triton", "float16")],
)
def test_kernels_pass(chip, name, dtype, H):
    with emulated(chip) as device:
        assert run(name, H, getattr(torch, dtype)) == ([], None)
    assert len(device.launches) > 2  # of the check and of the call


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "dtype", "was", "becomes", "wrong"),
    [
        ("triton", "bfloat16", "tanh.approx.f32", "mov.b32", "the output"),
        ("triton-tf32", "float32", "tanh.approx.f32", "mov.b32", "the output"),
        ("triton-ieee", "float32", "ex2.approx.f32", "mov.b32", "the output"),
    ],
)
def test_a_kernel_that_computes_something_else_is_reported(name, dtype, was, becomes, wrong):
    def change(ptx):
        return ptx.replace(was, becomes)

    with emulated(90, change=change):
        (report,), failure = run(name, 33, getattr(torch, dtype))
        assert f"{wrong} differs from the reference" in report
        assert f"{wrong} differs from the reference" in failure
        assert run(name, 34, getattr(torch, dtype))[0] == []


def test_a_backward_pass_that_computes_something_else_is_reported():
    def change(ptx):
        return ptx.replace("sub.f32", "add.f32") if ".entry backward_kernel(" in ptx else ptx

    with emulated(90, change=change):
        (report,), failure = run("triton", 33, torch.bfloat16)
        assert "the gradient of x differs from the reference" in report
        assert "the gradient of x differs from the reference" in failure
