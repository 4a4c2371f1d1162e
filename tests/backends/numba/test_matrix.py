"""The Numba backend's products of bfloat16, on AMX or vdpbf16ps: exact pieces, the layer with and without them,
infinite numbers, bfloat16.
"""

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, stack_module_state, vmap

import fastlstm
from fastlstm import lstm
from tests.helpers.layers import Layer, float32_errors
from tests.helpers.numba import PRECISIONS, needs_pieces, needs_unit, primitive

BACKENDS = (
    pytest.param("numba-bf16", marks=needs_unit),
    *(pytest.param(name, marks=needs_pieces) for name in PRECISIONS[1:]),
)


@needs_pieces
@settings(deadline=None)  # the first call compiles
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16))
def test_three_pieces_are_the_number(values):
    x, pieces, large = torch.tensor(values), torch.zeros(3, 32, dtype=torch.bfloat16), ctypes.c_int64()
    x = torch.where(x.abs() < 2.0**-100, 0, x)  # whose last piece would be below the smallest normal number
    primitive("to_row_operand", 3)(1, x.data_ptr(), 64, pieces.data_ptr(), 64, ctypes.addressof(large))
    assert bool(large.value) == bool(x.bfloat16().abs().max() >= 2.0**63)
    if x.abs().max() < 3.395e38:  # bfloat16's largest is 3.39e38
        assert torch.equal(pieces.double().sum(0)[:16].float(), x)


@pytest.mark.parametrize("pieces", [pytest.param(1, marks=needs_unit), pytest.param(3, marks=needs_pieces)])
def test_numbers_without_pieces(pieces):
    """NaN, whatever its bits, stays NaN; an infinite number is told of where there are pieces after it."""
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000, 0, 0x3F800000, 0] * 2, dtype=torch.int32)
    x, out, large = bits.view(torch.float32), torch.zeros(pieces, 32, dtype=torch.bfloat16), ctypes.c_int64()
    primitive("to_row_operand", pieces)(1, x.data_ptr(), 64, out.data_ptr(), 64, ctypes.addressof(large))
    assert torch.equal(out[0, :16].isnan(), x.isnan())
    assert not large.value
    x = torch.full((16,), -math.inf)
    primitive("to_row_operand", pieces)(1, x.data_ptr(), 64, out.data_ptr(), 64, ctypes.addressof(large))
    assert bool(large.value) == (pieces > 1)
    assert torch.equal(out[0, :16].float(), x)


@needs_unit
def test_bfloat16_is_rounded_as_torch_rounds():
    x = torch.cat([torch.randn(4096) * 10.0 ** torch.randint(-30, 30, (4096,)), torch.arange(4096) / 256 + 1])
    out = torch.zeros(512, 32, dtype=torch.bfloat16)
    primitive("to_row_operand", 1)(512, x.data_ptr(), 64, out.data_ptr(), 0, 0)
    assert torch.equal(out[:, :16].flatten(), x.bfloat16())


@needs_pieces
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "size", [(35, 8, 650, 650), (512, 5, 7, 64), (512, 16, 64, 64), (28, 128, 28, 128), (35, 8, 650, 300)]
)
def test_six_products_are_as_exact_as_nn_lstm(size):
    """The bounds that float32 has elsewhere."""
    layer = Layer(*size)
    for ours, theirs, least in zip(float32_errors(layer, "numba-bf16x6"), float32_errors(layer, None), (5e-7, 1e-6)):
        assert ours <= max(3 * theirs, least)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_last_chunk_of_one_block(backend, poisoned):
    """Each half of the batch rows has sums of its own: one of them has no product to start them."""
    inputs = Layer(833, 4, 5, 7).to(torch.float32)
    output = lstm(inputs[0], None, *inputs[3:], backend=backend)[0]
    assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), inputs[3:]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [1, 2])
def test_without_columns_of_x(backend, heads, poisoned):
    """A product of no K blocks is its initial value, the biases. From a state of zeros nothing at all is multiplied."""
    H = 64 * heads
    tensors = torch.zeros(3, 5, 0), torch.zeros(4 * H, 0), torch.randn(4 * H, 64) / 8, torch.randn(4 * H)
    (x, *weights), (exact_x, *exact_weights) = tensors, [a.double() for a in tensors]
    got, _ = lstm(x, None, *weights, backend=backend)
    want, _ = lstm(exact_x, None, *exact_weights, backend="reference")
    # h within 1 in factors of eight bits, and weights of about an eighth: the error of a sum of 64 products
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-2)


@needs_pieces
def test_a_stack_of_layers():
    """The unit's buffers of one thread's layers are not another's."""
    T, B, I, H = 9, 20, 70, 33
    models, x = [fastlstm.LSTM(I, H, backend="numba-bf16x6") for _ in range(3)], torch.randn(T, B, I)
    stacked, _ = stack_module_state(models)
    gradients = vmap(grad(lambda p: functional_call(models[0], p, (x,))[0].square().sum()))(stacked)
    for k, model in enumerate(models):
        model(x)[0].square().sum().backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(gradients[name][k], parameter.grad)


def results(layer, backend):
    inputs = layer.to(torch.float32)
    outputs = layer.run(inputs, backend)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.float() for g in layer.gradients])]


@pytest.mark.parametrize("where", [0, 1, 3, 4])  # x, h_0, weight_ih, weight_hh
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_an_infinite_number_is_computed_without_the_unit(backend, where):
    layer = Layer(4, 70, 40, 17)
    layer.inputs[where].view(-1)[7] = math.inf
    for a, b in zip(results(layer, backend), results(layer, "numba")):
        a, b = a.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0), b.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0)
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_numbers_overflow_only_where_their_products_do(backend):
    """Products of pieces could overflow one way and then the other."""
    x, weight_ih, weight_hh = torch.rand(1, 64, 32) * 1e30, torch.rand(64, 32) * 1e11, torch.zeros(64, 16)
    for sign in (1, -1):
        output = lstm(x * sign, None, weight_ih, weight_hh, backend=backend)[0]
        assert output.isfinite().all()
        want = lstm(x * sign, None, weight_ih, weight_hh, backend="numba")[0]
        assert torch.equal(output, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_gradient(backend):
    layer = Layer(4, 70, 40, 17)
    layer.gradients[0][2, 1, 3] = math.inf
    inputs = layer.to(torch.double)
    want = torch.autograd.grad(layer.truth(inputs), inputs, layer.gradients)
    for a, b in zip(results(layer, backend)[4:], want):
        assert torch.equal(a.isfinite(), b.isfinite())


@needs_pieces
@pytest.mark.parametrize("what", ["x", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
def test_infinite_numbers_where_weights_stay_packed(what):
    ours, theirs = fastlstm.LSTM(5, 17, backend="numba-bf16x6"), torch.nn.LSTM(5, 17)
    theirs.load_state_dict(ours.state_dict())
    x, state = torch.randn(4, 3, 5), (torch.randn(1, 3, 17), torch.randn(1, 3, 17))  # zeros would not be multiplied
    with torch.no_grad():
        ours(x, state)
        for module in (ours, theirs):
            if what != "x":
                getattr(module, what)[3] = -math.inf
        if what == "x":
            x[1, 2, 3] = math.inf
        for _ in range(2):
            output, want = ours(x, state)[0], theirs(x, state)[0]
            assert torch.equal(output.isnan(), want.isnan())
            torch.testing.assert_close(output, want, rtol=0, atol=1e-6, equal_nan=True)
