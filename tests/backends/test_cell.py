"""The cell's arithmetic, written once, on every kind of number it runs on;
and sigmoid and tanh as the kernels compute them.
"""

import ctypes
import math

import numba
import numpy as np
import pytest
import torch

from fastlstm import cells
from fastlstm.backends.numba.host import tasks
from fastlstm.cells.emit import load, python


def lstm(kind, **names):
    """The LSTM's derived function of this kind, which calls the functions of these names."""
    return load(python(getattr(cells.lstm.derived(), kind)), kind, names)


def autograd_cell(pre, c_prev, dh, dc):
    pre, c_prev = pre.clone().requires_grad_(), c_prev.clone().requires_grad_()
    i, f, g, o = pre.unbind()
    c = torch.sigmoid(f) * c_prev + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h, c, *torch.autograd.grad((h, c), (pre, c_prev), (dh, dc))


@pytest.fixture
def numbers():
    return [torch.randn(4, 64, dtype=torch.double) * 3, *(torch.randn(64, dtype=torch.double) for _ in range(3))]


def test_on_tensors(numbers):
    pre, c_prev, dh, dc = numbers
    h, c, *gates = lstm("forward", sigmoid=torch.sigmoid, tanh=torch.tanh)(*pre, c_prev)
    *dpre, dc_prev = lstm("backward", tanh=torch.tanh)(dh, dc, *gates, c_prev)
    for got, want in zip((h, c, torch.stack(dpre), dc_prev), autograd_cell(*numbers)):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_on_numba_scalars(numbers):
    sigmoid = numba.njit(lambda x: 1 / (1 + math.exp(-x)))
    forward = numba.njit(lstm("forward", sigmoid=sigmoid, tanh=math.tanh))
    backward = numba.njit(lstm("backward", tanh=math.tanh))
    want = autograd_cell(*numbers)
    pre, c_prev, dh, dc = (a.numpy() for a in numbers)
    for k in range(4):
        h, c, *gates = forward(*pre[:, k], c_prev[k])
        *dpre, dc_prev = backward(dh[k], dc[k], *gates, c_prev[k])
        expected = [a[..., k] for a in want]
        torch.testing.assert_close(
            torch.tensor([h, c, *dpre, dc_prev], dtype=torch.double), torch.hstack(expected), rtol=1e-13, atol=1e-14
        )


def run_cells(dtype, pre, c_prev, name="cell_forward_saving"):
    """h, c and the four gates for as many cells as fill whole vectors."""
    table = tasks.cell_primitives(cells.lstm, dtype.itemsize)
    lanes = tasks.primitives(dtype.itemsize, 0)["lanes"]
    rows, row = pre.shape[1] // lanes, lanes * dtype.itemsize
    packed = pre.to(dtype).view(4, rows, lanes).transpose(0, 1).contiguous()
    c_prev = c_prev.to(dtype).contiguous()
    h, c, gates = (torch.full_like(a, math.nan) for a in (c_prev, c_prev, packed))
    values = [n for a in (h, h, c_prev, c) for n in (a.data_ptr(), row)]  # of h_prev nothing is read
    found = (ctypes.c_int64 * len(values))(*values)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(table[name])
    function(rows, 0, 0, packed.data_ptr(), gates.data_ptr(), ctypes.addressof(found))
    return h, c, gates.transpose(0, 1).reshape(4, -1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 5e-16)])
def test_on_vectors(dtype, bound):
    pre, c_prev = torch.randn(4, 6400, dtype=torch.double) * 3, torch.randn(6400, dtype=torch.double)
    pre, c_prev = pre.to(dtype), c_prev.to(dtype)
    h, c, *gates = lstm("forward", sigmoid=torch.sigmoid, tanh=torch.tanh)(*pre.double(), c_prev.double())
    for got, want in zip(run_cells(dtype, pre, c_prev), (h, c, torch.stack(gates))):
        assert (got - want).abs().max() <= bound * 4  # c reaches 4, and its products' rounding with it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_past_the_caches(dtype):
    pre, c_prev = torch.randn(4, 6400, dtype=dtype), torch.randn(6400, dtype=dtype)
    names = "cell_forward_saving", "cell_forward_streaming"
    for one, other in zip(*(run_cells(dtype, pre, c_prev, name) for name in names), strict=True):
        assert torch.equal(one, other)


# The bounds of the fits: 1.9e-7 and 1.3e-7 in float32, 3e-16 in float64.
@pytest.mark.parametrize(
    ("dtype", "sigmoid_bound", "tanh_bound"), [(torch.float32, 2e-7, 1.5e-7), (torch.float64, 4e-16, 4e-16)]
)
def test_sigmoid_and_tanh(dtype, sigmoid_bound, tanh_bound):
    near_zero = torch.logspace(-30, 0, 4096, dtype=torch.double)
    x = torch.cat([torch.linspace(-40, 40, 1 << 17, dtype=torch.double), near_zero, -near_zero]).to(dtype)
    _, _, (i, f, g, o) = run_cells(dtype, x.expand(4, -1), torch.zeros_like(x))
    sigmoid, tanh = torch.sigmoid(x.double()), torch.tanh(x.double())
    for gate in (i, f, o):
        assert (gate - sigmoid).abs().max() <= sigmoid_bound
        assert gate.min() >= 0
        assert gate.max() <= 1
    assert (g - tanh).abs().max() <= tanh_bound
    assert g.abs().max() <= 1
    small = x.abs() < 1e-2
    assert ((g - tanh) / tanh)[
        small & (x != 0)
    ].abs().max() <= tanh_bound * 3  # relative, where a gradient must survive


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([math.inf, -math.inf, math.nan, largest, -largest, 0.0, 1e4, -1e4], dtype=dtype).repeat(8)
    _, _, (i, _, g, _) = run_cells(dtype, x.expand(4, -1), torch.zeros_like(x))
    torch.testing.assert_close(i, torch.sigmoid(x), rtol=0, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(g, torch.tanh(x), rtol=0, atol=1e-7, equal_nan=True)
    assert np.isnan(g[2].item())
