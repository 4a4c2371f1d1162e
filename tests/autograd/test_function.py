"""What the autograd Functions and operators refuse, and where they are defined."""

import pytest
import torch

import fastlstm
from fastlstm import lstm, torch_private
from tests.helpers import interpreter
from tests.helpers.layers import CPU_BACKENDS


@pytest.mark.parametrize("name", ["x", "weight_ih", "weight_hh", "bias_ih", "h_0", "c_0"])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_an_input_changed_in_place_between_the_passes_is_refused(backend, dtype, T, name):
    module, x = fastlstm.LSTM(5, 6, dtype=dtype, backend=backend), torch.randn(T, 3, 5, dtype=dtype)
    state = torch.randn(1, 3, 6, dtype=dtype), torch.randn(1, 3, 6, dtype=dtype)
    x.requires_grad_()
    output, (_, c_n) = module(x, state)
    states, weights = {"h_0": state[0], "c_0": state[1]}, dict(module.named_parameters())
    given = {"x": x, **states, **{name.removesuffix("_l0"): weight for name, weight in weights.items()}}
    with torch.no_grad():
        given[name].mul_(2)
    for result in (output, c_n):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward(retain_graph=True)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 3, 5, requires_grad=True)
        weights = [torch.empty(24, 5), torch.empty(24, 6)]
        output = lstm(x, None, *weights)[0]
        output.sum().backward()
        assert x.grad.shape == x.shape


def test_an_autocast_for_another_device_casts_nothing():
    lstm = fastlstm.LSTM(4, 6)
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    with pytest.raises(ValueError, match="dtype"):
        lstm(torch.randn(3, 2, 4, dtype=torch.double))
    torch.set_autocast_enabled("cuda", before)


@pytest.mark.skipif(torch_private.PUBLIC, reason="torch has no public name for what defines an operator again")
def test_the_operators_can_be_defined_again():
    """As a notebook's autoreload does."""
    code = """
import sys
for _ in range(2):
    for name in [name for name in sys.modules if name.split(".")[0] == "fastlstm"]:
        del sys.modules[name]
    import torch, fastlstm
    from fastlstm import torch_private
    x, w, u, h = torch.randn(3, 2, 4), torch.randn(20, 4), torch.randn(20, 5), torch.zeros(2, 5)
    w.requires_grad_()
    fastlstm.lstm(x, None, w, u)  # which defines them
    torch.ops.fastlstm.forward(x, w, u, None, None, h, h, None, None, False, True, "numba")[0].sum().backward()
    assert w.grad.shape == w.shape
"""
    interpreter.run(code, check=True)
