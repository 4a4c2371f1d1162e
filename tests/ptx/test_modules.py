"""Modules on an emulated GPU, and what `emulated` tells of it."""

import pytest
import torch

import fastlstm
from fastlstm.backends.triton import device as gpu
from tests.ptx import emulated
from tests.ptx.processes import on_each_chip

NAMES = ["pack_kernel", "forward_kernel", "pack_kernel", "backward_kernel"]


@on_each_chip
def test_a_module_trains(chip):
    module = fastlstm.LSTM(5, 9, backend="triton-ieee")
    x = torch.randn(2, 3, 5)
    with emulated(chip) as device:
        output, _ = module(x)
        output.sum().backward()
    truth = torch.nn.LSTM(5, 9)
    truth.load_state_dict(module.state_dict())
    want, _ = truth(x)
    want.sum().backward()
    assert not device.findings, device.findings
    torch.testing.assert_close(output, want, atol=2e-6, rtol=0)  # as in tests/ptx/layers.py
    for got, expected in zip(module.parameters(), truth.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, atol=2e-5, rtol=2e-5)
    assert [launched.kernel for launched in device.launches] == NAMES
    counts = device.counts
    assert counts["mma"] > 0
    assert counts["ld.global sectors"] >= counts["ld.global sectors at best"] > 0
    assert f".target sm_{chip}" in device.kernels["forward_kernel"][0]


def test_nothing_is_left_behind():
    before = gpu.INTERPRET, gpu.capability
    with emulated(80):
        assert gpu.capability(torch.device("cpu")) == (8, 0)
    assert before == (gpu.INTERPRET, gpu.capability)
    with pytest.raises(RuntimeError, match="CUDA tensors"):
        fastlstm.LSTM(5, 9, backend="triton")(torch.randn(2, 3, 5))
