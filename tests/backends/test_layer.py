"""Every backend's layer beside torch's own errors, and where numbers are infinite or lie in no memory of their own."""

import pytest
import torch

import fastlstm
from fastlstm import lstm
from tests.helpers.layers import BACKENDS, CPU_BACKENDS, Layer, float32_errors
from tests.helpers.tolerances import close, equal


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "size", [(28, 128, 28, 128), (5, 9, 28, 64), (20, 7, 100, 100), (3, 2, 7, 650), (30, 1, 28, 128)]
)
def test_as_close_to_float64_as_nn_lstm(backend, size):
    """The largest errors of some layers: of one alone it is a matter of chance whose is larger by how much."""
    theirs, ours = [], []
    for _ in range(2 if size[1] > 100 else 8):
        layer = Layer(*size)
        ours.append(float32_errors(layer, backend))
        theirs.append(float32_errors(layer, None))
    for of_ours, of_theirs, least in zip(zip(*ours), zip(*theirs), (5e-7, 1e-6)):
        assert max(of_ours) <= max(3 * max(of_theirs), least)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("size", [(1, 1, 1), (20, 1, 1), (1, 64, 1), (20, 64, 1)])
def test_expanded_gradient(backend, size):
    """One number for many, as a sum's gradient is, and one of other strides."""
    layer = Layer(20, 64, 5, 52)  # enough for it to stay one
    inputs = layer.to(torch.double)
    for gradient in (torch.randn(size, dtype=torch.double).expand(20, 64, 52), layer.gradients[0].mT.contiguous().mT):
        a = torch.autograd.grad(layer.run(inputs, backend)[0], inputs, gradient)
        b = torch.autograd.grad(layer.truth(inputs)[0], inputs, gradient)
        torch.testing.assert_close(a, b)


def test_tensors_whose_memory_does_not_hold_their_values():
    layer = Layer(5, 3, 1, 4)
    x, _, _, *weights = layer.to(torch.float32, requires_grad=False)
    negative = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negative.is_neg()
    assert torch.equal(lstm(negative, None, *weights)[0], lstm(-x, None, *weights)[0])
    zeros = torch._efficientzerotensor(5, 3, 1)
    assert torch.equal(lstm(zeros, None, *weights)[0], lstm(torch.zeros(5, 3, 1), None, *weights)[0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("size", [(3, 2, 5, 6), (40, 64, 5, 128)])  # in and out of the pool of large buffers
def test_cell_states_may_be_changed_in_place(backend, size):
    inputs = Layer(*size).to(torch.float32)
    cells = lstm(inputs[0], None, *inputs[3:], return_cells=True, backend=backend)[2]
    assert not cells._is_view()
    cells.mul_(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H", [1, 5, 16, 20, 33])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_input_saturates_its_gates(H, dtype, backend):
    """And nothing else: the columns that fill a vector beyond H take no part."""
    lstm = fastlstm.LSTM(4, H, dtype=dtype, backend="auto" if backend == "numba" else backend)
    with torch.no_grad():  # an infinite number times a weight of zero, which 16 bits have, is no number
        lstm.weight_ih_l0[lstm.weight_ih_l0 == 0] = 0.1
    x = torch.randn(4, 3, 4, dtype=dtype)
    x[0, 1, 2] = torch.inf
    with torch.no_grad():
        inferred = lstm(x)[0]
    output, states = lstm(x)
    for a in (inferred, output, *states):
        assert a.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_at_minus_infinity_is_closed(dtype, backend):
    """It is zero, so that nothing finite passes it, however large, and infinity times it is no number."""
    lstm, largest = fastlstm.LSTM(4, 20, dtype=dtype, backend=backend), torch.finfo(dtype).max
    with torch.no_grad():
        lstm.bias_ih_l0[:40] = -torch.inf  # the gates i and f
    c_0 = torch.tensor([1.0, -largest, torch.inf], dtype=dtype).view(1, 3, 1).expand(1, 3, 20)
    for learns in (False, True):
        with torch.set_grad_enabled(learns):
            _, (h_n, c_n) = lstm(torch.randn(1, 3, 4, dtype=dtype), (torch.randn(1, 3, 20, dtype=dtype), c_0))
        for state in (h_n, c_n):
            assert not state[:, :2].any()
            assert state[:, 2].isnan().all()


@pytest.mark.parametrize("which", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_bias_alone(backend, T, which):
    tensors, found = [torch.randn(*size, dtype=torch.double) for size in ((T, 3, 7), (132, 7), (132, 33), (132,))], []
    for name in (backend, backend, "reference"):
        x, *weights, bias = (a.clone().requires_grad_() for a in tensors)
        output, (_, c_n) = lstm(x, None, *weights, **{which: bias}, backend=name)
        found.append([output, c_n, *torch.autograd.grad((output * 2).sum() + c_n.sum(), [x, *weights, bias])])
    equal(*found[:2])
    close(found[0], found[2], "gradients")
