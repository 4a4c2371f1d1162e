"""`fastlstm.RNN`: layers of the library's cells and of cells declared here."""

import io
import pickle
import re
from copy import deepcopy
from functools import partial

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm import cells
from tests.helpers.layers import TORCH
from tests.helpers.modules import assert_same_gradients, randn
from tests.helpers.tolerances import close


@cells.cell(gates={"a": "xh", "b": "x"}, states=("h", "v"), params=("p", "q"), inputs=("m", "d"))
def gadget(a, b, h, v, p, q, m, d):
    """Two products of different widths, two states, two params and two inputs."""
    v = p * v + cells.sigmoid(b) * d
    return m * h + cells.tanh(a + q * v), v


@cells.cell(gates={"a": "x"}, states=("h",))
def no_product(a, h):
    return cells.tanh(a) + 0.5 * h


RNN = partial(fastlstm.RNN, dtype=torch.float64)


def loop(rnn, x, states, inputs):
    """All states after each step, one layer and direction after the other, by the cell's own function; time first."""
    cell, D, H = rnn.cell, 2 if rnn.bidirectional else 1, rnn.hidden_size
    of = {operand: [gate for gate, of in cell.gates.items() if operand in of] for operand in "xh"}
    last = []
    for layer in range(rnn.num_layers):
        sequences = []
        for direction in range(D):
            suffix = f"_l{layer}{'_reverse' * direction}"
            w = {name: getattr(rnn, name + suffix, None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            params = {name: getattr(rnn, name + suffix) for name in cell.params}
            state = [a[layer * D + direction] for a in states]
            after = [[] for _ in state]
            for t in range(len(x)) if direction == 0 else reversed(range(len(x))):
                sums = dict.fromkeys(cell.gates, 0)
                for operand, a in (("x", x[t]), ("h", state[0])):
                    if of[operand]:
                        weight, bias = (
                            w[f"weight_{operand.replace('x', 'i')}h"],
                            w[f"bias_{operand.replace('x', 'i')}h"],
                        )
                        for gate, part in zip(of[operand], nn.functional.linear(a, weight, bias).split(H, -1)):
                            sums[gate] = sums[gate] + part
                given = {**sums, **dict(zip(cell.states, state)), **params, **{k: a[t] for k, a in inputs.items()}}
                wanted = cell.function.__code__.co_varnames[: cell.function.__code__.co_argcount]
                new = cell(**{name: given[name] for name in wanted})
                state = list(new) if isinstance(new, tuple) else [new]
                for steps, a in zip(after, state):
                    steps.append(a)
            sequences.append([torch.stack(steps if direction == 0 else steps[::-1]) for steps in after])
            last.append(state)
        together = [torch.cat(each, -1) for each in zip(*sequences)]
        x = together[0]
    return together, tuple(torch.stack(each) for each in zip(*last))


def given(rnn, T=6, B=4):
    D = 2 if rnn.bidirectional else 1
    states = tuple(randn(rnn.num_layers * D, B, rnn.hidden_size) for _ in rnn.cell.states)
    if rnn.cell is cells.slstm:  # whose n is a sum of positive numbers
        states = tuple(torch.zeros_like(a, requires_grad=True) for a in states)
    return randn(T, B, rnn.input_size), states, {name: randn(T, B, rnn.hidden_size) for name in rnn.cell.inputs}


ALL = [*cells.CELLS, gadget, no_product]


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.name)
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=["", "2x2", "b"]
)
def test_equals_a_loop_over_the_cell(cell, options):
    rnn = RNN(cell, 3, 5, **options)
    x, states, inputs = given(rnn)
    expected, ends = loop(rnn, x, states, inputs)
    output, last, sequences = rnn(x, states, inputs, return_states=True)
    assert type(last) is type(sequences) is tuple
    assert output is sequences[0]
    got, want = [*sequences, *last], [*expected, *ends]
    assert_same_gradients(rnn, rnn, got, want, [x, *states, *inputs.values()])
    close(rnn(x, states, inputs), (expected[0], ends), "sums")


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (7, 1, 100, 7), (1, 7, 1, 100), (100, 1, 7, 1)])
def test_odd_sizes(size):
    T, B, I, H = size
    rnn = RNN(gadget, I, H)
    with torch.no_grad():
        rnn.p_l0.mul_(0.5)
    x, states, inputs = given(rnn, T, B)
    inputs = {name: 0.5 * a for name, a in inputs.items()}
    expected, ends = loop(rnn, x, states, inputs)
    close(rnn(x, states, inputs), (expected[0], ends), "sums")


@pytest.mark.parametrize(
    ("cell", "like"),
    [(cells.lstm, nn.LSTM), (cells.gru, nn.GRU), (cells.elman_tanh, nn.RNN),
     (cells.elman_relu, partial(nn.RNN, nonlinearity="relu"))],
)  # fmt: skip
def test_equals_torch_s(cell, like):
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}
    modules = []
    for make in (like, partial(fastlstm.RNN, cell)):
        torch.manual_seed(1)
        modules.append(make(3, 5, dtype=torch.float64, **options))
    theirs, ours = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x, results = randn(4, 6, 3), []
    for module in modules:
        torch.manual_seed(2)
        output, last = module(x)
        results.append([output, *(last if isinstance(last, tuple) else [last])])
    assert_same_gradients(ours, theirs, *results[::-1], [x])


def test_parameters():
    torch.manual_seed(0)
    rnn = fastlstm.RNN(gadget, 3, 5, 2, bidirectional=True)
    shapes = {"weight_ih": (10, 3), "weight_hh": (5, 5), "bias_ih": (10,), "bias_hh": (5,), "p": (5,), "q": (5,)}
    names = [f"{name}_l{k}{s}" for k in (0, 1) for s in ("", "_reverse") for name in shapes]
    assert list(rnn.state_dict()) == rnn._flat_weights_names == names
    for name, a in rnn.named_parameters():
        wanted = (10, 10) if name.startswith("weight_ih_l1") else shapes[name.partition("_l")[0]]
        assert a.shape == wanted
        assert 0 < a.abs().max() <= 5**-0.5
    torch.manual_seed(0)
    drawn = [torch.empty_like(a).uniform_(-(5**-0.5), 5**-0.5) for a in rnn.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(rnn.parameters(), drawn, strict=True))
    before = rnn.p_l0.clone()
    rnn.reset_parameters()
    assert not torch.equal(rnn.p_l0, before)
    assert [len(weights) for weights in rnn.all_weights] == [6] * 4
    assert list(fastlstm.RNN(gadget, 3, 5, bias=False).state_dict()) == ["weight_ih_l0", "weight_hh_l0", "p_l0", "q_l0"]
    assert list(fastlstm.RNN(cells.ind_rnn, 3, 5).state_dict()) == ["weight_ih_l0", "bias_ih_l0", "u_l0"]
    assert list(fastlstm.RNN(no_product, 3, 5, bias=False).state_dict()) == ["weight_ih_l0"]


def test_repr_device_and_dtype():
    rnn = fastlstm.RNN(gadget, 3, 5, 2, backend="reference", device="meta", dtype=torch.float16)
    assert repr(rnn) == "RNN(gadget, 3, 5, num_layers=2, backend=reference)"
    assert {(a.device.type, a.dtype) for a in rnn.parameters()} == {("meta", torch.float16)}
    with torch.device("meta"):
        assert fastlstm.RNN(gadget, 3, 5).p_l0.device.type == "meta"


@pytest.mark.parametrize("cell", [gadget, cells.peephole_lstm], ids=lambda cell: cell.name)
def test_copies(cell):
    rnn, buffer = RNN(cell, 3, 5, 2), io.BytesIO()
    x, states, inputs = given(rnn)
    expected = rnn(x, states, inputs)
    torch.save(rnn, buffer)
    buffer.seek(0)
    copies = [deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), torch.load(buffer, weights_only=False)]
    for copy in copies:
        assert type(copy) is fastlstm.RNN
        assert copy.cell is cell
        assert all(a is not b for a, b in zip(copy.parameters(), rnn.parameters(), strict=True))
        close(copy(x, states, inputs), expected, "sums")
    name = f"{cell.__module__}\n".encode() + cell.name.encode()
    assert name in pickle.dumps(rnn, protocol=0)
    other = RNN(cell, 3, 5, 2)
    other.load_state_dict(rnn.state_dict())
    close(other(x, states, inputs), expected, "sums")


def test_batch_first_and_one_sequence_alone():
    rnn = RNN(gadget, 3, 5, 2, bidirectional=True)
    x, states, inputs = given(rnn)
    expected, ends, sequences = rnn(x, states, inputs, return_states=True)
    one = rnn(x[:, 1], tuple(a[:, 1] for a in states), {k: a[:, 1] for k, a in inputs.items()}, return_states=True)
    close(one, (expected[:, 1], tuple(a[:, 1] for a in ends), tuple(a[:, 1] for a in sequences)), "sums")
    rnn.batch_first = True
    turned = {name: a.transpose(0, 1) for name, a in inputs.items()}
    output, last, others = rnn(x.transpose(0, 1), states, turned, return_states=True)
    assert output.shape == (4, 6, 10)
    close((output.transpose(0, 1), last, [a.transpose(0, 1) for a in others]), (expected, ends, sequences), "sums")


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_input_and_lengths(batch_first):
    rnn, n = RNN(gadget, 3, 5, 2, bidirectional=True), torch.tensor([2, 6, 1, 4])
    x, states, inputs = given(rnn)
    rows = [rnn(x[: n[b], b], tuple(a[:, b] for a in states), {k: a[: n[b], b] for k, a in inputs.items()},
                return_states=True) for b in range(4)]  # fmt: skip
    rnn.batch_first = batch_first
    if batch_first:
        x, inputs = x.transpose(0, 1), {k: a.transpose(0, 1) for k, a in inputs.items()}
    packed = pack_padded_sequence(x, n, enforce_sorted=False, batch_first=batch_first)
    output, last, sequences = rnn(packed, states, inputs, return_states=True)
    unpacked = [pad_packed_sequence(a)[0] for a in (output, *sequences)]
    masked, ends, (_, v) = rnn(x, states, inputs, lengths=n, return_states=True)
    masked, v = (a.transpose(0, 1) if batch_first else a for a in (masked, v))
    for b, (expected, end, all_states) in enumerate(rows):
        close([a[: n[b], b] for a in unpacked], [expected, *all_states], "sums")
        close([a[:, b] for a in last], end, "sums")
        close([a[:, b] for a in ends], end, "sums")
        close([masked[: n[b], b], v[: n[b], b]], all_states, "sums")
        assert not masked[n[b] :, b].any()


def test_reset():
    rnn, reset = RNN(gadget, 3, 5), torch.zeros(6, 4, dtype=torch.bool)
    x, states, inputs = given(rnn)
    reset[3] = True
    first = rnn(x[:3], states, {k: a[:3] for k, a in inputs.items()})[0]
    second, ends = rnn(x[3:], None, {k: a[3:] for k, a in inputs.items()})
    output, last = rnn(x, states, inputs, reset=reset)
    assert_same_gradients(rnn, rnn, [output, *last], [torch.cat([first, second]), *ends], [x, *inputs.values()])


@pytest.mark.parametrize("batched", [True, False])
def test_steps_equal_forward(batched):
    rnn = RNN(gadget, 3, 5, 2)
    x, states, inputs = given(rnn)
    if not batched:
        x, states, inputs = x[:, 0], tuple(a[:, 0] for a in states), {k: a[:, 0] for k, a in inputs.items()}
    expected, ends = rnn(x, states, inputs)
    outputs, state = [], states
    for t, x_t in enumerate(x):
        h_t, state = rnn.step(x_t, state, {k: a[t] for k, a in inputs.items()})
        outputs.append(h_t)
    close((torch.stack(outputs), state), (expected, ends), "sums")


@pytest.mark.parametrize("cell", [cells.mgu, no_product], ids=lambda cell: cell.name)
def test_a_tensor_is_the_state_of_a_cell_with_one(cell):
    rnn = RNN(cell, 3, 5, 2)
    x, states, _ = given(rnn)
    for module in (rnn, torch.compile(rnn, fullgraph=True, backend="aot_eager")):
        got, want = module(x, states[0]), module(x, states)
        assert type(got[1]) is tuple
        close(got, want, "sums")
    close(rnn(x[:, 0], states[0][:, 0]), rnn(x[:, 0], (states[0][:, 0],)), "sums")
    got = rnn.step(x[0], states[0])
    assert type(got[1]) is tuple
    close(got, rnn.step(x[0], states), "sums")


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


SHAPES = st.sampled_from([(T, B, H) for T in (1, 6) for B in (1, 4) for H in (1, 5)])
OPTIONS = st.fixed_dictionaries({"bidirectional": st.booleans(), "batch_first": st.booleans()})


@settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(SHAPES, SHAPES, OPTIONS, st.booleans())
def test_inputs_of_size_1(m, d, options, masked):
    """They are the expanded ones, and their gradients have their own shapes."""
    rnn = RNN(gadget, 3, 5, 2, **options)
    turned = (lambda a: a.transpose(0, 1)) if rnn.batch_first else (lambda a: a)
    x, states, _ = given(rnn)
    inputs = {"m": randn(*m), "d": randn(*d)}
    results = []
    for of in (lambda a: a, lambda a: a.expand(6, 4, 5)):
        taken = {name: turned(of(a)) for name, a in inputs.items()}
        output, last = rnn(turned(x), states, taken, lengths=[2, 6, 1, 4] if masked else None)
        results.append([output, *last])
    assert_same_gradients(rnn, rnn, *results, [x, *states, *inputs.values()])


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (1, 1)])
def test_inputs_of_size_1_in_steps(shape):
    rnn = RNN(gadget, 3, 5)
    x, states, inputs = given(rnn)
    small = randn(*shape)
    got, want = (rnn.step(x[0], states, {"m": inputs["m"][0], "d": d}) for d in (small, small.expand(4, 5)))
    close(got, want, "sums")
    alone, _ = rnn.step(x[0, 0], tuple(a[:, 0] for a in states), {"m": inputs["m"][0, 0], "d": small[0]})
    close(alone, got[0][0], "sums")
    message = re.escape("inputs['d'] must have shape (B, H) = (4, 5), where any size may be 1, got (5,)")
    with pytest.raises(ValueError, match=message):
        rnn.step(x[0], states, {"m": inputs["m"][0], "d": torch.zeros(5)})
    with pytest.raises(ValueError, match=re.escape("inputs['d'] must have shape (H,) = (5,)")):
        rnn.step(x[0, 0], None, {"m": inputs["m"][0, 0], "d": torch.zeros(4)})


def test_packed_sequences_take_inputs_of_size_1():
    rnn, n = RNN(gadget, 3, 5), torch.tensor([2, 6, 1, 4])
    x, states, inputs = given(rnn)
    packed, small = pack_padded_sequence(x, n, enforce_sorted=False), {"m": randn(6, 1, 1), "d": inputs["d"]}
    want = rnn(packed, states, {name: a.expand(6, 4, 5) for name, a in small.items()})
    got = rnn(packed, states, small)
    close((got[0].data, got[1]), (want[0].data, want[1]), "sums")


def test_functional_call():
    rnn = RNN(gadget, 3, 5)
    x, states, inputs = given(rnn)
    other = RNN(gadget, 3, 5)
    got = torch.func.functional_call(rnn, dict(other.named_parameters()), (x, states, inputs))
    close(got, other(x, states, inputs), "sums")


X = torch.zeros(6, 4, 3)
M = torch.zeros(6, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"inputs": None}, TypeError, "inputs must map m, d to tensors, got NoneType"),
        ({"inputs": M}, TypeError, "inputs must map m, d to tensors, got Tensor"),
        ({"inputs": {"m": M}}, ValueError, "inputs must map m, d to tensors, got m"),
        ({"inputs": {"m": M, "d": M, "e": M}}, ValueError, "inputs must map m, d to tensors, got m, d, e"),
        ({"inputs": {"m": M, "d": 1.0}}, TypeError, "inputs must map m, d to tensors, got float for d"),
        (
            {"inputs": {"m": M, "d": M[0]}},
            ValueError,
            "inputs['d'] must have shape (T, B, H) = (6, 4, 5), where any size may be 1, got (4, 5)",
        ),
        ({"inputs": {"m": M, "d": M[:, :2, :1]}}, ValueError, "(6, 4, 5), where any size may be 1, got (6, 2, 1)"),
        ({"inputs": {"m": M, "d": M.double()}}, RuntimeError, "inputs['d'] tensor with torch.float64"),
        ({"inputs": {"m": M, "d": M.to("meta")}}, RuntimeError, "inputs['d'] tensor at meta"),
        ({"states": M}, TypeError, "states must be a tuple of two tensors, h_0 and v_0, got Tensor"),
        ({"states": (M[:1],)}, RuntimeError, "states must be a tuple of two tensors, h_0 and v_0, got 1"),
        (
            {"states": (M[:1], 0)},
            TypeError,
            "states must be a tuple of two tensors, h_0 and v_0, got a tuple of Tensor",
        ),
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


@cells.cell(gates={"a": "x"}, states=("h",), params=("weight_hh",))
def odd_name(a, weight_hh):
    return cells.tanh(a * weight_hh)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (nn.LSTM, 3, 5),
            TypeError,
            "cell must be a fastlstm.Cell, as fastlstm.cell declares one, got type",
        ),
        ((3, 5, 1), TypeError, "got int"),
        ((no_x, 3, 5), ValueError, "cell must have a gate that sums x, got no_x with the gates {'a': 'h'}"),
        ((odd_name, 3, 5), ValueError, "cell must have params of other names than the weights, got odd_name with"),
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
