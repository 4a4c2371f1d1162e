"""A storage that was resized to nothing raises an error that names the tensor, where kernels would read address 0."""

import pytest
import torch

import fastlstm
from tests.helpers.layers import needs_native

T, B, I, H = 5, 2, 3, 8
FREED = r"^{} must have memory for its \d+ numbers, got a storage of 0 bytes$"
WEIGHTS = {f"{name}_l0": name for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
by_backend = pytest.mark.parametrize(
    "backend",
    ["numba", "reference", pytest.param("native", marks=needs_native), pytest.param("int8", marks=needs_native)],
)


def free(a):
    a.untyped_storage().resize_(0)


def layer(backend):
    if backend == "int8":
        return fastlstm.quantize(torch.nn.Sequential(fastlstm.LSTM(I, H)))[0]
    return fastlstm.LSTM(I, H, backend=backend)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("steps", [1, T])
@by_backend
def test_weights(backend, steps, has_run):
    for name, wanted in WEIGHTS.items():
        module, x = layer(backend), torch.randn(steps, B, I)
        for trains in (False, True)[: 1 if backend == "int8" else 2]:
            with torch.set_grad_enabled(trains):
                for _ in range(2 * has_run):  # the second call follows the plan of the first
                    module(x)
        free(getattr(module, name).data)
        for trains in (False, True)[: 1 if backend == "int8" else 2]:
            with torch.set_grad_enabled(trains), pytest.raises(ValueError, match=FREED.format(wanted)):
                module(x)


@pytest.mark.parametrize("has_run", [False, True])
@by_backend
def test_x_and_states(backend, has_run):
    module = layer(backend)
    for k, wanted in enumerate(("x", "hidden", "hidden")):
        x, h_0, c_0 = given = torch.randn(T, B, I), torch.randn(1, B, H), torch.randn(1, B, H)
        with torch.no_grad():
            for _ in range(2 * has_run):
                module(x, (h_0, c_0))
            free(given[k])
            with pytest.raises((ValueError, RuntimeError), match=FREED.format(wanted)):
                module(x, (h_0, c_0))


@by_backend
def test_a_stream(backend):
    stream, x = layer(backend).eval().stream(B), torch.randn(B, I)
    stream(x)
    free(x)
    with pytest.raises(ValueError, match=FREED.format("x_t")):
        stream(x)


@pytest.mark.parametrize("backend", ["numba", pytest.param("native", marks=needs_native)])
def test_a_backward_pass(backend):
    """As where a library frees the weights between the passes, and does not fill them again."""
    module, x = layer(backend), torch.randn(T, B, I, requires_grad=True)
    for name in ("weight_ih", "weight_hh"):
        output, _ = module(x)
        free(getattr(module, f"{name}_l0").data)
        with pytest.raises(ValueError, match=FREED.format(name)):
            output.sum().backward()
        module = layer(backend)


def test_params_and_inputs_of_a_cell():
    @fastlstm.cell(gates={"z": "xh"}, states=("h",), params=("u",), inputs=("a",))
    def cell(z, h, u, a):
        return fastlstm.cells.tanh(z + u * a)

    rnn, x, a = fastlstm.RNN(cell, I, H), torch.randn(T, B, I), torch.randn(T, B, H)
    rnn(x, None, {"a": a})
    free(a)
    with pytest.raises(RuntimeError, match=FREED.format(r"inputs\['a'\]")):
        rnn(x, None, {"a": a})
    free(rnn.u_l0.data)
    with pytest.raises(ValueError, match=FREED.format("u")):
        rnn(x, None, {"a": torch.randn(T, B, H)})


def test_tensors_of_no_numbers_need_no_memory():
    output, _ = fastlstm.LSTM(I, H)(torch.randn(T, 0, I))
    assert output.shape == (T, 0, H)
