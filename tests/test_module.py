"""What `fastlstm.LSTM` does beyond `torch.nn.LSTM`, and a module's life: copies, weights of any origin, tracing."""

import io
import itertools
import pickle
import re
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fastlstm

TOLERANCE = 1e-12  # float64, a few hundred terms below 10 each

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

both_backends = pytest.mark.parametrize("backend", ["reference", "numba"])


def pair(*args, **kwargs):
    """A `torch.nn.LSTM` and a `fastlstm.LSTM` of the same weights, float64."""
    backend = kwargs.pop("backend", None)
    theirs = nn.LSTM(*args, dtype=torch.float64, **kwargs)
    ours = fastlstm.LSTM(*args, dtype=torch.float64, backend=backend, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def randn(*size, grad=True):
    return torch.randn(*size, dtype=torch.float64, requires_grad=grad)


def assert_close(got, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def assert_same_gradients(ours, theirs, got, expected, inputs):
    """`got` and `expected` are lists of outputs; their gradients by the same random directions are compared."""
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    directions = [torch.randn_like(a) for a in got]
    gradients = torch.autograd.grad(got, [*inputs, *ours.parameters()], directions, allow_unused=True)
    references = torch.autograd.grad(expected, [*inputs, *theirs.parameters()], directions, allow_unused=True)
    for a, b, x in zip(gradients, references, [*inputs, *ours.parameters()], strict=True):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        assert_close(a, b, 10 * TOLERANCE)


# reset


def run_in_pieces(lstm, x, reset, hx):
    """Each row's pieces between resets run apart: what `reset` is equal to. All tensors time first."""
    outputs, ends = [], []
    for b in range(x.shape[1]):
        state = tuple(a[:, b : b + 1] for a in hx)
        starts = [0, *[t for t in range(x.shape[0]) if reset[t, b] and t], x.shape[0]]
        row = []
        for begin, end in itertools.pairwise(starts):
            if reset[begin, b]:
                state = tuple(torch.zeros_like(a) for a in state)
            output, state = lstm(x[begin:end, b : b + 1], state)
            row.append(output)
        outputs.append(torch.cat(row))
        ends.append(state)
    return torch.cat(outputs, 1), tuple(torch.cat(a, 1) for a in zip(*ends, strict=True))


@both_backends
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**31),
)
def test_reset_equals_pieces(backend, T, B, layers, batch_first, rate, seed):
    torch.manual_seed(seed)
    theirs, ours = pair(3, 5, layers, backend=backend)
    x, h_0, c_0, reset = randn(T, B, 3), randn(layers, B, 5), randn(layers, B, 5), torch.rand(T, B) < rate
    expected, states = run_in_pieces(theirs, x, reset, (h_0, c_0))
    ours.batch_first = batch_first
    if batch_first:
        got, got_states = ours(x.transpose(0, 1), (h_0, c_0), reset=reset.T)
        got = got.transpose(0, 1)
    else:
        got, got_states = ours(x, (h_0, c_0), reset=reset)
    assert_same_gradients(ours, theirs, [got, *got_states], [expected, *states], [x, h_0, c_0])


def test_reset_with_projection():
    theirs, ours = pair(3, 5, 2, proj_size=2)
    x, h_0, c_0 = randn(6, 2, 3), randn(2, 2, 2), randn(2, 2, 5)
    reset = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]], dtype=torch.bool).T
    expected, states = run_in_pieces(theirs, x, reset, (h_0, c_0))
    got, got_states = ours(x, (h_0, c_0), reset=reset)
    assert_same_gradients(ours, theirs, [got, *got_states], [expected, *states], [x, h_0, c_0])


def test_reset_stops_gradients():
    _, ours = pair(3, 5)
    x, h_0, c_0 = randn(6, 1, 3), randn(1, 1, 5), randn(1, 1, 5)
    output, _ = ours(x, (h_0, c_0), reset=torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.bool).unsqueeze(1))
    dx, dh_0, dc_0 = torch.autograd.grad(output[3:].sum(), [x, h_0, c_0])
    assert dx[3:].abs().min() > 0
    assert not dx[:3].any()
    assert not dh_0.any()
    assert not dc_0.any()


# lengths


@both_backends
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    st.integers(0, 2**31),
)
def test_lengths_equal_packed(backend, lengths, layers, bidirectional, batch_first, with_states, dtype, seed):
    torch.manual_seed(seed)
    theirs, ours = pair(3, 5, layers, bidirectional=bidirectional, backend=backend)
    T, B, states = 6, len(lengths), layers * (2 if bidirectional else 1)
    x, h_0, c_0 = randn(T, B, 3), randn(states, B, 5), randn(states, B, 5)
    if not with_states:
        h_0, c_0 = torch.zeros_like(h_0, requires_grad=True), torch.zeros_like(c_0, requires_grad=True)
    expected, ends = x.sum() * x.new_zeros(T, B, 5 * (2 if bidirectional else 1)), [h_0.clone(), c_0.clone()]
    rows = [b for b in range(B) if lengths[b]]  # torch takes no empty row: its output is zero, its state what it was
    if rows:
        kept = torch.tensor([lengths[b] for b in rows])
        packed = pack_padded_sequence(x[:, rows], kept, enforce_sorted=False)
        output, new = theirs(packed, (h_0[:, rows], c_0[:, rows]))
        output, _ = pad_packed_sequence(output, total_length=T)
        expected = expected.index_copy(1, torch.tensor(rows), output)
        ends = [a.index_copy(1, torch.tensor(rows), b) for a, b in zip(ends, new, strict=True)]
    ours.batch_first = batch_first
    hx = (h_0, c_0) if with_states else None
    n = torch.tensor(lengths, dtype=dtype)
    got, new = ours(x.transpose(0, 1) if batch_first else x, hx, lengths=n)
    got = got.transpose(0, 1) if batch_first else got
    for b in range(B):
        assert not got[lengths[b] :, b].any()
    inputs = [x, h_0, c_0] if with_states else [x]
    assert_same_gradients(ours, theirs, [got, *new], [expected, *ends], inputs)


def test_lengths_beyond_the_input():
    _, ours = pair(3, 5)
    x = randn(4, 2, 3)
    for got, expected in zip(ours(x, lengths=torch.tensor([9, -1]))[1], ours(x[:, :1])[1], strict=True):
        assert_close(got[:, :1], expected)
        assert not got[:, 1].any()


@both_backends
def test_lengths_win_over_reset(backend):
    _, ours = pair(3, 5, 2, backend=backend)
    x, reset = randn(6, 3, 3), torch.rand(6, 3) < 0.5
    reset[4:, 0] = True  # past row 0's end
    lengths = torch.tensor([4, 6, 1])
    got, states = ours(x, reset=reset, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        expected, ends = ours(x[:n, b : b + 1], reset=reset[:n, b : b + 1])
        assert_close(got[:n, b : b + 1], expected)
        assert not got[n:, b].any()
        for a, e in zip(states, ends, strict=True):
            assert_close(a[:, b : b + 1], e)


def test_unbatched_reset_and_lengths():
    _, ours = pair(3, 5, batch_first=True)
    x, reset = randn(6, 3), torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    expected, (h_n, c_n), cells = ours(
        x.unsqueeze(0), reset=reset.unsqueeze(0), lengths=torch.tensor([5]), return_cells=True
    )
    got = ours(x, reset=reset, lengths=torch.tensor(5), return_cells=True)
    for a, b in zip([got[0], *got[1], got[2]], [expected[0], h_n[:, 0], c_n[:, 0], cells[0]], strict=True):
        assert_close(a, b)


def test_masks_wait_for_no_device():
    """Fake tensors have no values: reading one, or a shape that depends on one, raises there."""
    with FakeTensorMode():
        lstm = fastlstm.LSTM(3, 5, 2)
        x = torch.empty(6, 4, 3)
        output, (h_n, _) = lstm(x, lengths=torch.empty(4, dtype=torch.int64), reset=torch.empty(6, 4, dtype=torch.bool))
        assert output.shape == (6, 4, 5)
        assert h_n.shape == (2, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "call", "error", "message"),
    [
        ({}, {"reset": [True]}, TypeError, "reset must be a boolean tensor of shape (T, B), got list"),
        (
            {},
            {"reset": torch.zeros(5, 2)},
            TypeError,
            "reset must be a boolean tensor of shape (T, B), got torch.float32",
        ),
        ({}, {"reset": torch.zeros(2, 5) > 0}, ValueError, "reset must have shape (T, B) = (5, 2), got (2, 5)"),
        (
            {"batch_first": True},
            {"reset": torch.zeros(2, 5) > 0},
            ValueError,
            "reset must have shape (B, T) = (5, 2), got (2, 5)",
        ),
        (
            {"bidirectional": True},
            {"reset": torch.zeros(5, 2) > 0},
            ValueError,
            "reset needs a module of one direction, and this one is bidirectional",
        ),
        ({}, {"lengths": [1, 2]}, TypeError, "lengths must be an integer tensor of shape (B,), got list"),
        (
            {},
            {"lengths": torch.ones(2)},
            TypeError,
            "lengths must be an integer tensor of shape (B,), got torch.float32",
        ),
        (
            {},
            {"lengths": torch.ones(2) > 0},
            TypeError,
            "lengths must be an integer tensor of shape (B,), got torch.bool",
        ),
        ({}, {"lengths": torch.ones(5).long()}, ValueError, "lengths must have shape (B,) = (2,), got (5,)"),
    ],
)
def test_bad_masks(arguments, call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.LSTM(3, 5, **arguments)(torch.zeros(5, 2, 3), **call)


@pytest.mark.parametrize("name", ["reset", "lengths"])
def test_packed_input_takes_no_masks(name):
    packed = pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 3]))
    value = torch.zeros(5, 2, dtype=torch.bool) if name == "reset" else torch.tensor([5, 3])
    with pytest.raises(ValueError, match=f"{name} must be None for a PackedSequence"):
        fastlstm.LSTM(3, 5)(packed, **{name: value})


# cell states


def cell_loop(lstm, x, hx):
    """Every cell state of the last layer, each layer and direction a loop over `torch.nn.LSTMCell`."""
    D = 2 if lstm.bidirectional else 1
    for layer in range(lstm.num_layers):
        outputs, cells = [], []
        for direction in range(D):
            k = layer * D + direction
            cell = nn.LSTMCell(x.shape[-1], lstm.hidden_size, dtype=x.dtype)
            weights = dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), lstm.all_weights[k], strict=True))
            h, c = hx[0][k], hx[1][k]
            hs, cs = [], []
            for x_t in x.unbind(0) if direction == 0 else x.flip(0).unbind(0):
                h, c = torch.func.functional_call(cell, weights, (x_t, (h, c)))
                hs.append(h)
                cs.append(c)
            step = 1 if direction == 0 else -1
            outputs.append(torch.stack(hs[::step]))
            cells.append(torch.stack(cs[::step]))
        x = torch.cat(outputs, -1)
    return torch.cat(cells, -1)


@both_backends
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_cells_equal_a_cell_loop(backend, layers, bidirectional):
    theirs, ours = pair(3, 5, layers, bidirectional=bidirectional, backend=backend)
    states = layers * (2 if bidirectional else 1)
    x, h_0, c_0 = randn(6, 4, 3), randn(states, 4, 5), randn(states, 4, 5)
    expected = cell_loop(theirs, x, (h_0, c_0))
    output, (h_n, c_n), cells = ours(x, (h_0, c_0), return_cells=True)
    reference, ends = theirs(x, (h_0, c_0))
    assert_close(output, reference)
    assert_same_gradients(ours, theirs, [h_n, c_n, cells], [*ends, expected], [x, h_0, c_0])
    ours.batch_first = True
    assert_close(ours(x.transpose(0, 1), (h_0, c_0), return_cells=True)[2].transpose(0, 1), cells)


def test_cells_of_packed_input():
    _, ours = pair(3, 5, bidirectional=True)
    x, lengths = randn(6, 3, 3), torch.tensor([2, 6, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    cells, _ = pad_packed_sequence(ours(packed, return_cells=True)[2])
    expected = ours(x, lengths=lengths, return_cells=True)[2]
    for b, n in enumerate(lengths):
        assert_close(cells[:n, b], expected[:n, b])


# step


@both_backends
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"num_layers": 3}, {"proj_size": 2}, {"num_layers": 2, "bias": False}])
def test_steps_equal_forward(backend, arguments, batched):
    if backend == "numba" and "proj_size" in arguments:
        backend = "reference"  # numba has no projections
    theirs, ours = pair(3, 5, backend=backend, **arguments)
    batch = (4,) if batched else ()
    x = randn(6, *batch, 3)
    expected, ends = theirs(x)
    outputs, state = [], None
    for x_t in x:
        h_t, state = ours.step(x_t, state)
        outputs.append(h_t)
    assert_same_gradients(ours, theirs, [torch.stack(outputs), *state], [expected, *ends], [x])


def test_step_drops_as_forward():
    _, ours = pair(3, 5, 3, dropout=0.5)
    x = randn(4, 3)
    torch.manual_seed(1)
    expected, ends = ours(x.unsqueeze(0))
    torch.manual_seed(1)
    output, state = ours.step(x)
    assert_close(output, expected[0])
    for a, b in zip(state, ends, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "x_t", "state", "error", "message"),
    [
        ({"bidirectional": True}, (2, 3), None, ValueError, "step needs a module of one direction"),
        ({}, (1, 2, 3), None, ValueError, "Expected x_t to be 1D or 2D, got 3D instead"),
        ({}, (2, 4), None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
        ({}, (4,), None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
        ({}, (2, 3), ((1, 2, 5),), RuntimeError, "lstm expects two hidden states"),
        ({}, (2, 3), ((2, 5), (2, 5)), RuntimeError, "Expected state[0] size (1, 2, 5), got [2, 5]"),
        ({}, (2, 3), ((1, 2, 5), (1, 3, 5)), RuntimeError, "Expected state[1] size (1, 2, 5), got [1, 3, 5]"),
        ({}, (3,), ((1, 1, 5), (1, 1, 5)), RuntimeError, "Expected state[0] size (1, 5), got [1, 1, 5]"),
        ({"dtype": torch.float64}, (2, 3), None, ValueError, "RNN input dtype (torch.float32) does not match weight"),
        ({"device": "meta"}, (2, 3), None, RuntimeError, "found input tensor at cpu and parameter tensor at meta"),
    ],
)
def test_bad_steps(arguments, x_t, state, error, message):
    state = state if state is None else tuple(torch.zeros(size) for size in state)
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.LSTM(3, 5, **arguments).step(torch.zeros(x_t), state)


# forget_bias and backend


@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}])
def test_forget_bias(arguments):
    torch.manual_seed(0)
    plain = fastlstm.LSTM(3, 5, **arguments)
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(3, 5, forget_bias=1.5, **arguments)
    for parameters in (lstm, deepcopy(lstm)):
        for (name, a), b in zip(parameters.named_parameters(), plain.parameters(), strict=True):
            if "bias" in name:
                assert torch.equal(a[5:10], torch.full((5,), 1.5 if "bias_ih" in name else 0.0))
                assert torch.equal(torch.cat([a[:5], a[10:]]), torch.cat([b[:5], b[10:]]))
            else:
                assert torch.equal(a, b)
        parameters.reset_parameters()
    assert "forget_bias=1.5" in repr(lstm)
    assert fastlstm.LSTM(3, 5, forget_bias=1, device="meta").bias_ih_l0.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"forget_bias": "1"}, TypeError, "forget_bias should be a number or None, got: str"),
        ({"forget_bias": True}, TypeError, "forget_bias should be a number or None, got: bool"),
        (
            {"forget_bias": 1.0, "bias": False},
            ValueError,
            "forget_bias needs bias=True, got forget_bias=1.0 and bias=False",
        ),
        ({"backend": "cudnn"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_keywords(arguments, error, message):
    with pytest.raises(error, match=message):
        fastlstm.LSTM(3, 5, **arguments)


def test_backend_of_the_module():
    x = torch.randn(4, 2, 3)
    lstm, cell = fastlstm.LSTM(3, 5, backend="reference"), fastlstm.LSTMCell(3, 5, backend="reference")
    assert "backend=reference" in repr(lstm)
    assert "backend=reference" in repr(cell)
    with fastlstm.use_backend("aten"):  # a module's own wins: aten takes no mask
        lstm(x, lengths=torch.tensor([4, 2]))
        with pytest.raises(RuntimeError, match="aten backend has no step mask"):
            fastlstm.LSTM(3, 5)(x, lengths=torch.tensor([4, 2]))
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlstm.LSTMCell(3, 5, backend="cudnn")


# the life of a module

CONFIGURATIONS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": 2, "bias": False}]
each_configuration = pytest.mark.parametrize("arguments", CONFIGURATIONS)


def same_results(a, b):
    x = torch.randn(4, 3, 3, dtype=a.weight_ih_l0.dtype)
    (output, states), (other, other_states) = a(x), b(x)
    assert torch.equal(output, other)
    assert all(torch.equal(s, t) for s, t in zip(states, other_states, strict=True))


@each_configuration
def test_copies(arguments):
    lstm = fastlstm.LSTM(3, 5, backend="reference", **arguments)
    buffer = io.BytesIO()
    torch.save(lstm, buffer)
    buffer.seek(0)
    copies = [deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), torch.load(buffer, weights_only=False)]
    for copy in copies:
        assert type(copy) is fastlstm.LSTM
        assert copy.backend == "reference"
        assert all(a is not b for a, b in zip(copy.parameters(), lstm.parameters(), strict=True))
        assert all(a is b for a, b in zip(copy._flat_weights, copy.parameters(), strict=True))
        same_results(lstm, copy)
    with torch.no_grad():
        copies[0].weight_hh_l0.zero_()
    assert lstm.weight_hh_l0.any()


@each_configuration
def test_state_dicts_both_ways(arguments):
    theirs, ours = nn.LSTM(3, 5, **arguments), fastlstm.LSTM(3, 5, **arguments)
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    other = nn.LSTM(3, 5, **arguments)
    other.load_state_dict(ours.state_dict())
    with torch.device("meta"):
        empty = fastlstm.LSTM(3, 5, **arguments)
    empty.load_state_dict(theirs.state_dict(), assign=True)
    same_results(empty, ours)


def test_share_memory_and_to():
    lstm = fastlstm.LSTM(3, 5, 2)
    lstm.share_memory()
    assert all(p.is_shared() for p in lstm.parameters())
    lstm.flatten_parameters()
    same_results(lstm, deepcopy(lstm))
    lstm.to(torch.float64)
    assert lstm(torch.zeros(4, 2, 3, dtype=torch.float64))[0].dtype == torch.float64
    assert lstm.half()(torch.zeros(4, 2, 3, dtype=torch.float16))[0].dtype == torch.float16
    assert lstm.bfloat16()(torch.zeros(4, 2, 3, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_weights_are_read_at_every_call():
    theirs, ours = pair(3, 5, 2)
    x = randn(4, 2, 3)
    weight = nn.Parameter(torch.randn_like(ours.weight_hh_l1))
    theirs.weight_hh_l1 = ours.weight_hh_l1 = weight
    assert_close(ours(x)[0], theirs(x)[0])
    assert ours._flat_weights[5] is weight
    del ours.weight_hh_l1  # a plain tensor in its place, as weight dropping does
    ours.weight_hh_l1 = 2 * weight
    with torch.no_grad():
        theirs.weight_hh_l1.mul_(1)
    doubled = {**dict(theirs.named_parameters()), "weight_hh_l1": 2 * weight}
    assert_close(ours(x)[0], torch.func.functional_call(theirs, doubled, (x,))[0])
    (gradient,) = torch.autograd.grad(ours(x)[0].sum(), weight)
    assert gradient.any()


def test_functional_call():
    theirs, ours = pair(3, 5, 2, bidirectional=True)
    weights = {name: randn(*p.shape) for name, p in ours.named_parameters()}
    x = randn(4, 2, 3)
    before = ours(x)[0]
    got, expected = (torch.func.functional_call(module, weights, (x,)) for module in (ours, theirs))
    values = list(weights.values())
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        assert_close(a, b)
    gradients = [torch.autograd.grad(result[0].cos().sum(), [x, *values]) for result in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, 10 * TOLERANCE)
    assert torch.equal(ours(x)[0], before)


def test_ensemble_by_vmap():
    lstms = [fastlstm.LSTM(3, 5, dtype=torch.float64) for _ in range(3)]
    weights, buffers = torch.func.stack_module_state(lstms)
    x = randn(4, 2, 3, grad=False)

    def run(weights):
        return torch.func.functional_call(lstms[0], (weights, buffers), (x,))[0]

    for got, lstm in zip(torch.vmap(run)(weights), lstms, strict=True):
        assert_close(got, lstm(x)[0])


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "bias_ih_l0"])
def test_parametrized(name):
    theirs, ours = pair(3, 5, 2)
    x = randn(4, 2, 3)
    doubled = {**dict(theirs.named_parameters()), name: 2 * getattr(theirs, name)}
    expected = torch.func.functional_call(theirs, doubled, (x,))
    parametrize.register_parametrization(ours, name, Double())
    for module in (ours, deepcopy(ours)):
        for a, b in zip([module(x)[0], *module(x)[1]], [expected[0], *expected[1]], strict=True):
            assert_close(a, b)
    original = ours.parametrizations[name].original
    (gradient,) = torch.autograd.grad(ours(x)[0].sum(), original)
    (reference,) = torch.autograd.grad(expected[0].sum(), getattr(theirs, name))
    assert_close(gradient, reference, 10 * TOLERANCE)
    with torch.no_grad():
        original.zero_()  # the next call sees it
    assert not torch.equal(ours(x)[0], expected[0])
    parametrize.remove_parametrizations(ours, name)
    assert type(ours) is fastlstm.LSTM
    assert getattr(ours, name) in set(ours.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("weight_norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm(weight_norm):
    theirs, ours = pair(3, 5)
    x = randn(4, 2, 3)
    expected = theirs(x)[0]  # the norms start as the weights' own
    weight_norm(ours, "weight_hh_l0")
    assert_close(ours(x)[0], expected)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours(x)[0].sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in ours.parameters())
    assert not torch.allclose(ours(x)[0], expected)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_weights_with_an_input_gradient(training):
    theirs, ours = (module.requires_grad_(False).train(training) for module in pair(3, 5, 2, dropout=0.0))
    x = randn(4, 2, 3)
    gradients = [torch.autograd.grad(module(x)[0].cos().sum(), x)[0] for module in (ours, theirs)]
    assert_close(*gradients)


def test_one_trained_weight():
    theirs, ours = pair(3, 5, 2)
    for module in (theirs, ours):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name == "weight_hh_l0")
    x = randn(4, 2, 3, grad=False)
    gradients = [torch.autograd.grad(m(x)[1][0].cos().sum(), m.weight_hh_l0)[0] for m in (ours, theirs)]
    assert_close(*gradients)


def test_checkpoint():
    _, ours = pair(3, 5, 2)
    x = randn(4, 2, 3)
    wanted = [x, *ours.parameters()]
    expected = torch.autograd.grad(ours(x)[0].cos().sum(), wanted)
    got = torch.autograd.grad(checkpoint(ours, x, use_reentrant=False)[0].cos().sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


def test_data_parallel_replica():
    _, ours = pair(3, 5, 2)
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours._parameters.items():
        setattr(replica, name, parameter * 1)  # a replica's weights are plain tensors, as nn.DataParallel makes them
    x = randn(4, 2, 3)
    assert_close(replica(x)[0], ours(x)[0])
    (gradient,) = torch.autograd.grad(replica(x)[0].sum(), ours.weight_hh_l1)
    assert gradient.any()
    assert_close(nn.DataParallel(ours)(x)[0], ours(x)[0])


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, ours = pair(3, 5, 2)
        x = randn(4, 2, 3)
        expected = torch.autograd.grad(ours(x)[0].cos().sum(), ours.parameters())
        parallel = nn.parallel.DistributedDataParallel(ours)
        parallel(x)[0].cos().sum().backward()
    finally:
        dist.destroy_process_group()
    for parameter, gradient in zip(ours.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast(dtype, packed):
    """16-bit weights and inputs cost half a unit of 2**-8 or 2**-11 each; outputs are below 1."""
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(3, 5, 2, dropout=0.0, bidirectional=True)
    x, hx = torch.randn(4, 2, 3, requires_grad=True), (torch.randn(4, 2, 5), torch.randn(4, 2, 5))
    expected, _ = lstm(x, hx)
    inputs = pack_padded_sequence(x, torch.tensor([4, 4])) if packed else x
    with torch.autocast("cpu", dtype):
        output, (h_n, _) = lstm(inputs, hx)
        mixed, _ = lstm(x.to(dtype), hx)  # a dtype that outside autocast is refused
    output = output.data.view_as(expected) if packed else output
    for got in (output, mixed):
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=5e-2 if dtype == torch.bfloat16 else 5e-3)
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in lstm.parameters())
    assert h_n.dtype == output.dtype
    with pytest.raises(ValueError, match="RNN input dtype"):
        lstm(x.to(dtype), hx)


def test_cell_autocast():
    cell, x = fastlstm.LSTMCell(3, 5), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        h, c = cell(x)
        h, c = cell(x.bfloat16(), (h, c.float()))
    expected = cell(x, cell(x))
    for got, reference in zip((h, c), expected, strict=True):
        torch.testing.assert_close(got.float(), reference, rtol=0, atol=5e-2)


@pytest.mark.parametrize(
    ("arguments", "size", "call"),
    [
        ({}, (4, 2, 3), {}),
        ({"num_layers": 2, "bidirectional": True, "batch_first": True}, (4, 2, 3), {}),
        ({}, (4, 3), {}),
        ({}, (4, 2, 3), {"reset": torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]]) > 0, "return_cells": True}),
        ({"bidirectional": True}, (4, 2, 3), {"lengths": torch.tensor([0, 3])}),
    ],
)
def test_traced_whole(arguments, size, call):
    """dynamo takes forward and backward without a break."""
    torch._dynamo.reset()
    lstm = fastlstm.LSTM(3, 5, **arguments)
    x = torch.randn(size)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    expected, got = lstm(x, **call), compiled(x, **call)
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # float32, terms below 1
    gradients = [torch.autograd.grad(result[0].cos().sum(), lstm.weight_hh_l0)[0] for result in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_traced_step_and_cell():
    torch._dynamo.reset()
    lstm, cell = fastlstm.LSTM(3, 5), fastlstm.LSTMCell(3, 5)

    @torch.compile(backend="eager", fullgraph=True)
    def run(x, state):
        h, state = lstm.step(x, state)
        return h, state, cell(x, (state[0][0], state[1][0]))

    x, state = torch.randn(2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    h, new = lstm.step(x, state)
    got = run(x, state)
    assert torch.equal(got[0], h)
    for a, b in zip(got[2], cell(x, (new[0][0], new[1][0])), strict=True):
        assert torch.equal(a, b)


def test_base_classes():
    assert issubclass(fastlstm.LSTM, nn.RNNBase)
    assert issubclass(fastlstm.LSTMCell, nn.RNNCellBase)
    assert not issubclass(fastlstm.LSTM, nn.LSTM)  # dynamo refuses those


def test_subclass_may_wrap_the_constructor():
    class Stacked(fastlstm.LSTM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, num_layers=2, **kwargs)

        def forward(self, input, hx=None):  # noqa: A002
            return super().forward(input, hx)[0]

    assert Stacked(3, 5)(torch.zeros(4, 2, 3)).shape == (4, 2, 5)


def test_step_gives_an_output_of_its_own():
    lstm = fastlstm.LSTM(3, 4)
    with torch.no_grad():
        h, (h_n, _) = lstm.step(torch.randn(2, 3))
        before = h_n.clone()
        h.zero_()
    assert torch.equal(h_n, before)
