"""Errors of `fastlstm.RNN`: of its construction, of calls, of states and of inputs."""

import re

import pytest
import torch
from torch import nn

import fastlstm
from fastlstm import cells
from tests.helpers.layers import TORCH
from tests.helpers.rnn import gadget, without_x


def test_errors_of_the_state_of_a_cell_with_one():
    rnn = fastlstm.RNN(cells.mgu, 3, 5)
    with pytest.raises(TypeError, match="states must be a tensor, h_0, or a tuple of it, got dict"):
        rnn(X, {"h": M[:1]})
    with pytest.raises(RuntimeError, match="states must be a tensor, h_0, or a tuple of it, got 2"):
        rnn(X, (M[:1], M[:1]))
    with pytest.raises(RuntimeError, match="For batched 3-D input, states should also be 3-D"):
        rnn(X, M[0])
    with pytest.raises(RuntimeError, match=re.escape("Expected states[0] size (1, 4, 5), got [2, 4, 5]")):
        rnn(X, M[:2])
    with pytest.raises(TypeError, match="state must be a tensor, h_0, or a tuple of it, got float"):
        rnn.step(X[0], 0.0)
    with pytest.raises(RuntimeError, match=re.escape("Expected state[0] size (1, 4, 5), got [4, 5]")):
        rnn.step(X[0], M[0])


X = torch.zeros(6, 4, 3)
M = torch.zeros(6, 4, 5)
INPUTS = 'inputs must map to tensors (T, B, H), as {"m": ..., "d": ...}'
SHAPE, TWO = "must have shape (T, B, H) = (6, 4, 5)", "states must be a tuple of two tensors, h_0 and v_0"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"inputs": None}, TypeError, f"{INPUTS}, got NoneType"),
        ({"inputs": M}, TypeError, f"{INPUTS}, got Tensor"),
        ({"inputs": {"m": M}}, ValueError, f"{INPUTS}, got m"),
        ({"inputs": {"m": M, "d": M, "e": M}}, ValueError, f"{INPUTS}, got m, d, e"),
        ({"inputs": {"m": M, "d": 1.0}}, TypeError, f"{INPUTS}, got float for d"),
        ({"inputs": {"m": M, "d": M[0]}}, ValueError, f"inputs['d'] {SHAPE}, where any size may be 1, got (4, 5)"),
        ({"inputs": {"m": M, "d": M[:, :2, :1]}}, ValueError, "(6, 4, 5), where any size may be 1, got (6, 2, 1)"),
        ({"inputs": {"m": M, "d": M.double()}}, RuntimeError, "inputs['d'] tensor with torch.float64"),
        ({"inputs": {"m": M, "d": M.to("meta")}}, RuntimeError, "inputs['d'] tensor at meta"),
        ({"states": M}, TypeError, f"{TWO}, got Tensor"),
        ({"states": (M[:1],)}, RuntimeError, f"{TWO}, got 1"),
        ({"states": (M[:1], 0)}, TypeError, f"{TWO}, got a tuple of Tensor"),
        ({"states": (M[:1], M[:2])}, RuntimeError, "Expected states[1] size (1, 4, 5), got [2, 4, 5]"),
        ({"states": (M[0], M[0])}, RuntimeError, "states should also be 3-D but got (2-D, 2-D) tensors"),
        ({"input": X[..., :2]}, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 2"),
        ({"input": X[None]}, ValueError, "RNN: Expected input to be 2D or 3D, got 4D tensor instead"),
        ({"input": [1.0]}, TypeError, "input must be a tensor or a PackedSequence, got list"),
    ],
)
def test_errors_of_forward(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.RNN(gadget, 3, 5)(**{"input": X, "inputs": {"m": M, "d": M}, **call})


def test_errors_of_a_cell_without_inputs():
    rnn = fastlstm.RNN(cells.slstm, 3, 5)
    with pytest.raises(ValueError, match="inputs must be None or empty, got m"):
        rnn(X, inputs={"m": M})
    with pytest.raises(TypeError, match="states must be a tuple of four tensors, h_0, c_0, n_0 and m_0, got dict"):
        rnn(X, {"h": M})


@cells.cell(gates={"a": "h"}, states=("h",))
def no_x(a):
    return cells.tanh(a)


@cells.cell(gates={}, states=("h",), inputs=("x",))
def bare(h, x):
    return cells.tanh(x + h)


@cells.cell(gates={"a": "x"}, states=("h",), params=("weight_hh",))
def odd_name(a, weight_hh):
    return cells.tanh(a * weight_hh)


ELMAN = "use fastlstm.Elman in the place of torch.nn.RNN, or pass a cell first: RNN(fastlstm.cells.mgu, 8, 16)"


@pytest.mark.parametrize(
    ("arguments", "options", "got"),
    [
        ((8, 16), {}, "int"),
        ((8, 16, 2), {}, "int"),
        ((8, 16), {"num_layers": 2, "nonlinearity": "relu"}, "int"),
        ((), {"input_size": 8, "hidden_size": 16, "batch_first": True}, "NoneType"),
    ],
)
def test_arguments_of_torchs_rnn(arguments, options, got):
    """Of which Python would say how many it takes."""
    with pytest.raises(TypeError, match=f"^{re.escape(ELMAN)}: cell must be a fastlstm.Cell, got {got}$"):
        fastlstm.RNN(*arguments, **options)


def undeclared(a):
    return cells.tanh(a)


@pytest.mark.parametrize(
    ("cell", "write"),
    [
        ("gru", "pass the cell fastlstm.cells.gru"),
        ("LSTM", "pass the cell fastlstm.cells.lstm"),
        ("ugrnn", "pass a cell of fastlstm.cells, or what @fastlstm.cell declares"),
        (nn.GRU, "pass the cell fastlstm.cells.gru"),
        (nn.LSTMCell, "pass the cell fastlstm.cells.lstm"),
        (nn.GRUCell(3, 5), "pass the cell fastlstm.cells.gru"),
        (nn.Linear, "pass a cell of fastlstm.cells, or what @fastlstm.cell declares"),
        (undeclared, "declare undeclared by @fastlstm.cell(gates=..., states=...)"),
    ],
)
def test_what_is_no_cell(cell, write):
    """The message begins with what to write."""
    got = f"cell must be a fastlstm.Cell, got {type(cell).__name__}"
    with pytest.raises(TypeError, match=f"^{re.escape(write)}: {got}$"):
        fastlstm.RNN(cell, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((no_x, 0, 5), ValueError, "cell must have a gate that sums x, or inputs, got no_x with the gates {'a': 'h'}"),
        ((without_x, 3, 5), ValueError, "input_size must be 0 for the cell without_x, which has no gate that sums x"),
        ((without_x, None, 5), ValueError, "which has no gate that sums x, got None"),
        ((without_x, 0, 5, 2), ValueError, "num_layers must be 1 for the cell without_x, which has no gate"),
        ((odd_name, 3, 5), ValueError, "cell must have one weight or param of a name, got odd_name with two of"),
        ((gadget, 3.0, 5), TypeError, "input_size should be of type int, got: float"),
        ((gadget, 3, 0), ValueError, "hidden_size must be greater than zero"),
        ((gadget, 3, 5, 0), ValueError, "num_layers must be greater than zero"),
        ((gadget, 3, 5, 1, 1), TypeError, "bias should be of type bool, got: int"),
    ],
)
def test_errors_of_construction(arguments, error, message):
    if "should be of type" in message and TORCH < (2, 13):
        pytest.skip("older versions of torch do not check these types")
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.RNN(*arguments)
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlstm.RNN(gadget, 3, 5, backend="cudnn")


@pytest.mark.parametrize(
    ("cell", "heads", "error", "message"),
    [
        (gadget, 5, ValueError, "heads must be 1 or more and divide hidden_size, which is 12, got 5"),
        (gadget, 0, ValueError, "heads must be 1 or more and divide hidden_size, which is 12, got 0"),
        (gadget, -3, ValueError, "heads must be 1 or more and divide hidden_size, which is 12, got -3"),
        (gadget, 24, ValueError, "heads must be 1 or more and divide hidden_size, which is 12, got 24"),
        (gadget, 3.0, TypeError, "heads should be of type int, got: float"),
        (gadget, True, TypeError, "heads should be of type int, got: bool"),
        (gadget, None, TypeError, "heads should be of type int, got: NoneType"),
        (
            cells.ind_rnn,
            2,
            ValueError,
            "heads must be 1 for the cell ind_rnn, which has no gate that sums h and no products, got 2",
        ),
    ],
)
def test_errors_of_heads(cell, heads, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.RNN(cell, 3, 12, heads=heads)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"inputs": {"x_a": M, "x_b": M[:3]}}, ValueError, f"inputs['x_b'] {SHAPE}, where"),
        ({"inputs": {"x_a": M, "x_b": M[..., :3]}}, ValueError, f"inputs['x_b'] {SHAPE}"),
        ({"inputs": {"x_a": M, "x_b": M[None]}}, ValueError, "inputs['x_b'] must have 3 dimensions, or 2 for one"),
        ({"input": X, "inputs": {"x_a": M, "x_b": M}}, RuntimeError, "equal to input_size. Expected 0, got 3"),
    ],
)
def test_errors_of_a_cell_without_x(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.RNN(without_x, 0, 5)(**{"input": None, **call})


def test_errors_of_steps_of_a_cell_without_x():
    rnn = fastlstm.RNN(without_x, 0, 5)
    message = "inputs['x_a'] must have 2 dimensions, or 1 for one sequence alone, got shape (6, 4, 5)"
    with pytest.raises(ValueError, match=re.escape(message)):
        rnn.step(None, None, {"x_a": M, "x_b": M})
    with pytest.raises(TypeError, match=r'tensors \(B, H\), as {"x_a": ..., "x_b": ...}, got NoneType'):
        rnn.stream(4)(None)
    for call in (fastlstm.RNN(gadget, 3, 5), fastlstm.RNN(gadget, 3, 5).step):
        with pytest.raises(TypeError, match=r"must be a tensor.*, got NoneType"):
            call(None, None, {"m": M, "d": M})


def test_the_start_of_a_parametrized_param():
    """`reset_parameters` sets it as a new module has it."""
    rnn = fastlstm.RNN(cells.layer_norm_gru, 3, 4)
    name = next(name for name, _ in rnn.named_parameters() if name.startswith("gain"))
    torch.nn.utils.parametrize.register_parametrization(rnn, name, torch.nn.Identity())
    rnn.reset_parameters()
    assert torch.equal(getattr(rnn, name), torch.ones(4))
