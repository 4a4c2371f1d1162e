"""Layers of a cell that has no product of x: the values of x come as inputs, and ``input`` is None."""

import pytest
import torch

import fastlstm
from fastlstm import cells
from tests.helpers.cases import diagonal
from tests.helpers.modules import copies_of, randn
from tests.helpers.rnn import RNN, given, without_x
from tests.helpers.tolerances import close

of_both = pytest.mark.parametrize("backend", ["numba", "reference"])


@cells.cell(gates={}, states=("h", "v"), inputs=("x",))
def scan(h, v, x):
    """No weight at all."""
    v = 0.9 * v + cells.sigmoid(x + h)
    return cells.tanh(v) * x, v


def values(*size):
    """Two inputs that are views of one tensor, as a product with several blocks of rows gives them."""
    return dict(zip(without_x.inputs, randn(*size[:-1], 2 * size[-1], grad=False).chunk(2, -1)))


def test_parameters():
    rnn = fastlstm.RNN(without_x, 0, 6, heads=3)
    assert repr(rnn) == "fastlstm.RNN(without_x, 0, 6, heads=3)"
    shapes = {name: tuple(a.shape) for name, a in rnn.state_dict().items()}
    assert shapes == {"weight_hh_l0": (12, 2), "bias_hh_l0": (12,), "p_l0": (6,)}
    assert list(fastlstm.RNN(without_x, 0, 6, bias=False).state_dict()) == ["weight_hh_l0", "p_l0"]
    assert list(fastlstm.RNN(diagonal, 0, 6).state_dict()) == ["o_l0"]


@of_both
def test_sizes_of_1_and_0(backend):
    rnn, inputs = RNN(without_x, 0, 6, backend=backend), values(5, 4, 6)
    for name, size in (("x_a", (1, 4, 6)), ("x_b", (5, 1, 1)), ("x_a", (1, 1, 1))):
        small = randn(*size)
        got, want = (rnn(None, inputs=inputs | {name: a})[0] for a in (small, small.expand(5, 4, 6)))
        close(got, want, "values")
    assert rnn(None, inputs=values(1, 1, 6))[0].shape == (1, 1, 6)
    for T, B in ((0, 4), (5, 0)):
        output, (h_n, _) = rnn(None, inputs=values(T, B, 6))
        assert (output.shape, h_n.shape) == ((T, B, 6), (1, B, 6))


def test_inputs_of_any_strides_are_not_copied():
    rnn, whole = fastlstm.RNN(without_x, 0, 64, heads=4, backend="numba"), torch.randn(64, 2, 50, 64)
    inputs = dict(zip(without_x.inputs, whole.transpose(0, 2).unbind(1)))  # (T, B, H), whose steps are closer than rows
    want, _ = rnn(None, inputs={name: a.contiguous() for name, a in inputs.items()})
    rnn(None, inputs=inputs)  # which packs the weights
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        got, _ = rnn(None, inputs=inputs)
    assert torch.equal(got, want)
    assert not {"aten::copy_", "aten::clone"} & {event.key for event in profile.key_averages()}


@of_both
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}], ids=str)
def test_the_only_input_may_be_the_input(options, backend):
    rnn = RNN(scan, 0, 6, backend=backend, **options)
    _, states, inputs = given(rnn)
    masks = {"lengths": torch.tensor([6, 0, 3, 5])}
    x = inputs["x"].transpose(0, 1).detach().requires_grad_() if rnn.batch_first else inputs["x"]
    for x_or_row, given_states, chosen in ((x, states, {}), (x, None, masks), (x[0], None, {})):
        want = rnn(None, given_states, {"x": x_or_row}, **chosen, return_states=True)
        got = rnn(x_or_row, given_states, **chosen, return_states=True)
        assert all(torch.equal(a, b) for each, other in zip(got[1:], want[1:]) for a, b in zip(each, other))
    with pytest.raises(TypeError, match=r'^inputs must map to tensors \(., ., H\), as {"x_a": ..., "x_b": ...}, got'):
        RNN(without_x, 0, 6)(x)


@of_both
def test_a_layer_without_weights(backend):
    rnn = RNN(scan, 0, 6, backend=backend)
    assert not list(rnn.parameters())
    assert not rnn.state_dict()
    assert repr(rnn) == f"fastlstm.RNN(scan, 0, 6, backend={backend})"
    x = randn(5, 4, 6)
    output, (h_n, v_n) = rnn(x)
    for copy in copies_of(rnn):
        close(copy(x)[0], output, "values")
    steps, states, stream = [], None, rnn.stream(4)
    for x_t in x.detach():
        h, states = rnn.step(x_t, states)
        steps.append(h)
        close(stream(x_t), h, "values")
    close((torch.stack(steps), states), (output, (h_n, v_n)), "sums")
    assert rnn(x[:, :0])[0].shape == (5, 0, 6)
    assert rnn(x[:0])[0].shape == (0, 4, 6)
    for dtype in (torch.float32, torch.bfloat16):  # `to` says what the inputs must be, as with weights
        assert rnn.to(dtype)(x.to(dtype))[0].dtype == dtype
        with pytest.raises(
            RuntimeError, match=rf"not the same dtype, .* {dtype} and inputs\['x'\] tensor with torch.f"
        ):
            rnn(x)
    with pytest.raises(RuntimeError, match=r"Expected states\[0\] size \(1, 4, 6\), got \[1, 3, 6\]"):
        rnn.double()(x, tuple(a[:, :3] for a in (h_n, v_n)))


def test_errors_of_an_only_input_name_it():
    neurons = fastlstm.RNN(cells.lif, 0, 5)
    with pytest.raises(TypeError, match=r"input must be a tensor of current, \(T, B, H\), .*got list"):
        neurons([1.0])
    stream = neurons.stream(2)
    with pytest.raises(ValueError, match=r"x_t must be \(B, H\) = \(2, 5\), got \(3, 4\)"):
        stream(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"x_t must have the dtype torch.float32, got torch.float64"):
        stream(torch.randn(2, 5).double())
    with pytest.raises(RuntimeError, match=r"a stream has no gradients: pass x_t.detach\(\)"):
        stream(torch.randn(2, 5, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"pass current.detach\(\)"):
        stream(None, {"current": torch.randn(2, 5, requires_grad=True)})


@pytest.mark.parametrize(("depth", "error"), [("2", TypeError), (2.5, TypeError), (True, TypeError), (0, ValueError)])
def test_errors_of_a_depth(depth, error):
    with pytest.raises(error, match=r"depth must be .*, got "):
        cells.rhn(depth)
