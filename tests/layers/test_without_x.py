"""Layers of a cell that has no product of x: the values of x come as inputs, and ``input`` is None."""

import pytest
import torch

import fastlstm
from fastlstm import cells
from tests.helpers.modules import assert_same_gradients, randn
from tests.helpers.rnn import RNN, given, loop, without_x
from tests.helpers.tolerances import close

of_both = pytest.mark.parametrize("backend", ["numba", "reference"])


@cells.cell(gates={}, states=("h",), params=("u",), inputs=("x",))
def diagonal(h, u, x):
    """No product at all."""
    return cells.tanh(x + u * h)


def values(*size):
    """Two inputs that are views of one tensor, as a product with several blocks of rows gives them."""
    return dict(zip(without_x.inputs, randn(*size[:-1], 2 * size[-1], grad=False).chunk(2, -1)))


@of_both
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False, "heads": 3}], ids=str)
@pytest.mark.parametrize("cell", [without_x, diagonal], ids=lambda cell: cell.name)
def test_equals_a_loop(poisoned, cell, options, backend):
    options = options if cell is without_x else {**options, "heads": 1}
    rnn = RNN(cell, 0, 6, backend=backend, **options)
    _, states, inputs = given(rnn)
    masks = {"lengths": torch.tensor([6, 0, 3, 5])}
    if not rnn.bidirectional:
        masks["reset"] = torch.rand(6, 4) < 0.3
    for chosen in ({}, masks):
        expected, ends = loop(rnn, None, states, inputs, **chosen)
        output, last, every = rnn(None, states, inputs, **chosen, return_states=True)
        assert_same_gradients(rnn, rnn, [output, *every[1:], *last], [*expected, *ends], [*states, *inputs.values()])
        with torch.no_grad():
            close(rnn(None, states, inputs, **chosen)[0], expected[0], "sums")


def test_parameters():
    rnn = fastlstm.RNN(without_x, 0, 6, heads=3)
    assert repr(rnn) == "fastlstm.RNN(without_x, 0, 6, heads=3)"
    shapes = {name: tuple(a.shape) for name, a in rnn.state_dict().items()}
    assert shapes == {"weight_hh_l0": (12, 2), "bias_hh_l0": (12,), "p_l0": (6,)}
    assert list(fastlstm.RNN(without_x, 0, 6, bias=False).state_dict()) == ["weight_hh_l0", "p_l0"]
    assert list(fastlstm.RNN(diagonal, 0, 6).state_dict()) == ["u_l0"]


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
