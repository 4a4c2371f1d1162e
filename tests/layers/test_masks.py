"""Resets and lengths: equal to running the pieces apart, and to packed sequences, in outputs and gradients."""

import itertools
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm.cells import lstm as LSTM
from tests.helpers.contract import LAYERS
from tests.helpers.layers import needs_native
from tests.helpers.modules import REFERENCE, assert_same_gradients, both_backends, pair, randn
from tests.helpers.tolerances import close, equal
from tests.helpers.transforms import dtype_of, needs_triton

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


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


def with_tuples(module):
    """The module as a function of x and a tuple of states, which returns the output and a tuple of the last states."""

    def call(x, states, **masks):
        output, last = module(x, states if len(states) > 1 else states[0], **masks)
        return output, last if isinstance(last, tuple) else (last,)

    return call


each_kind = pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *((kind, "numba") for kind in LAYERS),
        ("LSTM", "reference"),
        *(pytest.param(kind, "native", marks=needs_native) for kind in ("LSTM", "GRU")),
    ],
)


@each_kind
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_reset_equals_pieces(kind, backend, T, B, layers, batch_first, rate, seed):
    torch.manual_seed(seed)
    torch_s, options = LAYERS[kind]
    theirs, ours = pair(3, 5, layers, like=torch_s, backend=backend, **options)
    x, reset = randn(T, B, 3), torch.rand(T, B) < rate
    states = tuple(randn(layers, B, 5) for _ in range(2 if kind == "LSTM" else 1))
    expected, ends = run_in_pieces(with_tuples(theirs), x, reset, states)
    ours.batch_first = batch_first
    masked, reset = (a.transpose(0, 1) if batch_first else a for a in (x, reset))
    got, last = with_tuples(ours)(masked, states, reset=reset)
    got = got.transpose(0, 1) if batch_first else got
    assert_same_gradients(ours, theirs, [got, *last], [expected, *ends], [x, *states])


@needs_triton
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("backend", ["triton-ieee"], indirect=True)
def test_masks_of_a_module_in_float32(backend, bidirectional):
    """Layers of one or two directions with `lengths`, of one with `reset` too, against the reference in float64."""
    theirs, ours = pair(3, 5, 2, bidirectional=bidirectional, like=REFERENCE, dtype=dtype_of(backend), backend=backend)
    directions = 2 if bidirectional else 1
    x, h_0, c_0 = torch.randn(6, 9, 3), torch.randn(2 * directions, 9, 5), torch.randn(2 * directions, 9, 5)
    output = torch.randn(6, 9, 5 * directions)
    masks = {"lengths": torch.tensor([6, 0, 1, 5, 3, 6, 2, 4, 6])}
    if not bidirectional:
        masks["reset"] = torch.rand(6, 9) < 0.3
    results = []
    for module in (ours, theirs):
        inputs = [a.to(module.weight_ih_l0.dtype).requires_grad_() for a in (x, h_0, c_0)]
        got, states = module(inputs[0], tuple(inputs[1:]), **masks)
        gradients = torch.autograd.grad(got, [*inputs, *module.parameters()], output.to(got.dtype))
        results.append([got, *states, *gradients])
    close(*results, "derivatives")
    assert not results[0][0][1:, 2].any()


def test_reset_with_projection():
    theirs, ours = pair(3, 5, 2, proj_size=2)
    x, h_0, c_0 = randn(6, 2, 3), randn(2, 2, 2), randn(2, 2, 5)
    reset = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1]], dtype=torch.bool).T
    expected, states = run_in_pieces(theirs, x, reset, (h_0, c_0))
    got, got_states = ours(x, (h_0, c_0), reset=reset)
    assert_same_gradients(ours, theirs, [got, *got_states], [expected, *states], [x, h_0, c_0])


def test_padding_of_a_projected_layer_may_be_nan():
    lstm, x = fastlstm.LSTM(3, 4, proj_size=2), torch.randn(5, 2, 3)
    x[2:, 1] = torch.nan
    x.requires_grad_()
    lstm(x, lengths=torch.tensor([5, 2]))[0].sum().backward()
    for a in (x, *lstm.parameters()):
        assert a.grad.isfinite().all()


@both_backends
@pytest.mark.parametrize("called", ["module", "bidirectional module", "function", "RNN"])
def test_padding_of_results_may_be_written(backend, called):
    """The backward pass reads the output and the cell states, so those that a caller gets are copies."""
    options, lengths = {"bidirectional": called == "bidirectional module", "backend": backend}, torch.tensor([5, 2])
    module = fastlstm.RNN(LSTM, 3, 4, **options) if called == "RNN" else fastlstm.LSTM(3, 4, **options)
    x, gradients = torch.randn(5, 2, 3), []
    for fill in (None, 7.0):
        if called == "function":
            of_function = {"lengths": lengths, "return_cells": True, "backend": backend}
            output, _, cells = fastlstm.lstm(x, None, *module.parameters(), **of_function)
        elif called == "RNN":
            output, _, (_, cells) = module(x, lengths=lengths, return_states=True)
        else:
            output, _, cells = module(x, lengths=lengths, return_cells=True)
        loss = (output[:2] + 2 * cells[:2]).sum()
        if fill is not None:
            output[2:, 1], cells[2:, 1] = fill, fill
        gradients.append(torch.autograd.grad(loss, module.parameters()))
    equal(*gradients)


INTEGER_TYPES = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@each_kind
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(1, 3), st.booleans(), st.booleans(),
    st.booleans(), st.sampled_from(INTEGER_TYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_lengths_equal_packed(kind, backend, lengths, layers, bidirectional, batch_first, with_states, dtype, seed):
    torch.manual_seed(seed)
    torch_s, options = LAYERS[kind]
    theirs, ours = pair(3, 5, layers, bidirectional=bidirectional, like=torch_s, backend=backend, **options)
    T, B, D = 6, len(lengths), 2 if bidirectional else 1
    x, states = randn(T, B, 3), [randn(layers * D, B, 5) for _ in range(2 if kind == "LSTM" else 1)]
    states = states if with_states else [torch.zeros_like(a, requires_grad=True) for a in states]
    expected, ends = x.sum() * x.new_zeros(T, B, 5 * D), [a.clone() for a in states]
    rows = [b for b in range(B) if lengths[b]]  # torch takes no empty row: its output is zero, its state what it was
    if rows:
        packed = pack_padded_sequence(x[:, rows], torch.tensor([lengths[b] for b in rows]), enforce_sorted=False)
        output, last = with_tuples(theirs)(packed, tuple(a[:, rows] for a in states))
        output, _ = pad_packed_sequence(output, total_length=T)
        expected = expected.index_copy(1, torch.tensor(rows), output)
        ends = [a.index_copy(1, torch.tensor(rows), b) for a, b in zip(ends, last, strict=True)]
    ours.batch_first = batch_first
    given = tuple(states) if with_states else (None,)
    got, last = with_tuples(ours)(
        x.transpose(0, 1) if batch_first else x, given, lengths=torch.tensor(lengths, dtype=dtype)
    )
    got = got.transpose(0, 1) if batch_first else got
    for b in range(B):
        assert not got[lengths[b] :, b].any()
    assert_same_gradients(ours, theirs, [got, *last], [expected, *ends], [x, *states] if with_states else [x])


@both_backends
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_lengths_outside_the_input_count_as_its_ends_under_vmap(backend, dtype):
    """Their values are not looked at there."""
    _, ours = pair(3, 5, 2, bidirectional=True, backend=backend)
    x, lengths = randn(1, 4, 6, 3), torch.tensor([[9, -1, 5, 4, 0, torch.iinfo(dtype).min]], dtype=dtype)
    mapped = torch.func.vmap(lambda x, lengths: ours(x, lengths=lengths))
    got, expected = mapped(x, lengths), mapped(x, lengths.clamp(0, 4))
    assert_same_gradients(ours, ours, [got[0], *got[1]], [expected[0], *expected[1]], [x])


def of_a_compiled_module(lstm, x, lengths):
    return torch.compile(lstm, backend="eager", fullgraph=True)(x, lengths=lengths)[0]


def of_an_exported_module(lstm, x, lengths):
    return torch.export.export(lstm, (x,), {"lengths": lengths}).module()(x, lengths=lengths)[0]


def of_a_trace(lstm, x, lengths):
    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x, lengths):
            return self.lstm(x, lengths=lengths)[0]

    return torch.jit.trace(Padded(), (x, lengths), check_trace=False)(x, lengths)


def of_one_of_many(lstm, x, lengths):
    return torch.func.vmap(lambda x: lstm(x, lengths=lengths)[0])(x.unsqueeze(0)).squeeze(0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("run", [of_a_compiled_module, of_an_exported_module, of_a_trace, of_one_of_many])
def test_lengths_outside_the_input_where_they_cannot_be_read(run):
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 4, 3)
    got = run(lstm, x, torch.tensor([9, -1, 5, 2]))
    torch.testing.assert_close(got, lstm(x, lengths=torch.tensor([4, 0, 4, 2]))[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint64, torch.int64])
@pytest.mark.parametrize("bad", [7, -1, 100])
def test_lengths_outside_the_input(bad, dtype, batch_first):
    if bad < 0 and dtype == torch.uint64:
        bad = 2**64 - 1
    lengths = torch.tensor([6, bad, 0], dtype=dtype)
    lstm = fastlstm.LSTM(3, 5, backend="aten", batch_first=batch_first)  # which would refuse any lengths
    x = torch.zeros(6, 3, 3)
    with pytest.raises(ValueError, match=re.escape(f"lengths must be from 0 to T = 6, got {bad}")):
        lstm(x.transpose(0, 1) if batch_first else x, lengths=lengths)


def test_a_length_outside_one_sequence_alone():
    for bad in (torch.tensor(7), 7):
        with pytest.raises(ValueError, match="lengths must be from 0 to T = 6, got 7"):
            fastlstm.LSTM(3, 5)(torch.zeros(6, 3), lengths=bad)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "lengths",
    [
        [4, 0, 3],
        (4, 0, 3),
        [np.int64(4), np.int64(0), np.int64(3)],
        np.array([4, 0, 3]),
        np.array([4, 0, 3], dtype=np.uint16),
        np.array([3, 0, 4])[::-1],
        read_only(np.array([4, 0, 3])),
    ],
    ids=["list", "tuple", "list of numpy's", "int64", "uint16", "from the end", "read-only"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_lengths_that_are_no_tensor(lengths, compiled):
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 3, 3)
    call = torch.compile(lstm, backend="eager") if compiled else lstm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = call(x, lengths=lengths)[0]
    torch.testing.assert_close(got, lstm(x, lengths=torch.tensor([4, 0, 3]))[0])


@pytest.mark.parametrize(
    "form",
    [
        torch.Tensor.tolist,
        lambda a: tuple(map(tuple, a.tolist())),
        torch.Tensor.numpy,
        lambda a: a.flip(0).numpy()[::-1],
        lambda a: read_only(a.clone().numpy()),
        lambda a: list(a.numpy()),
        lambda a: list(a),
    ],
    ids=["list", "tuple", "array", "from the end", "read-only", "list of arrays", "list of tensors"],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_that_are_no_tensor(form, batch_first):
    lstm, x = fastlstm.LSTM(3, 5, batch_first=batch_first), torch.randn(4, 3, 3)
    reset = torch.rand(4, 3) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = lstm(x, reset=form(reset))[0]
    assert torch.equal(got, lstm(x, reset=reset)[0])


def test_resets_elsewhere_that_are_no_tensor():
    """In a compiled call, of one sequence alone, of no rows, and in the other functions and modules that take them."""
    lstm, x, reset = fastlstm.LSTM(3, 5), torch.randn(4, 3, 3), torch.rand(4, 3) < 0.5
    want = lstm(x, reset=reset)
    for values in (reset.tolist(), reset.numpy()):
        assert torch.equal(torch.compile(lstm, backend="eager")(x, reset=values)[0], want[0])
        assert torch.equal(fastlstm.lstm(x, None, *lstm.parameters(), reset=values)[0], want[0])
    of_one = lstm(x[:, 0], reset=reset[:, 0].tolist())[0]
    assert torch.equal(of_one, lstm(x[:, 0], reset=reset[:, 0])[0])
    assert lstm(torch.zeros(4, 0, 3), reset=[[]] * 4)[0].shape == (4, 0, 5)
    for module in (fastlstm.GRU(3, 5), fastlstm.Elman(3, 5), fastlstm.RNN(fastlstm.cells.mgu, 3, 5)):
        assert torch.equal(module(x, reset=reset.tolist())[0], module(x, reset=reset)[0])


def test_lengths_of_no_rows_and_of_one_sequence_alone():
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(4, 3)
    assert lstm(torch.zeros(4, 0, 3), lengths=[])[0].shape == (4, 0, 5)
    expected = lstm(x, lengths=torch.tensor(2))[0]
    for lengths in (2, np.int32(2), np.array(2)):
        assert torch.equal(lstm(x, lengths=lengths)[0], expected)


@both_backends
def test_lengths_win_over_reset(backend):
    _, ours = pair(3, 5, 2, backend=backend)
    x, reset = randn(6, 3, 3), torch.rand(6, 3) < 0.5
    reset[4:, 0] = True  # past row 0's end
    lengths = torch.tensor([4, 6, 1])
    got, states = ours(x, reset=reset, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        expected, ends = ours(x[:n, b : b + 1], reset=reset[:n, b : b + 1])
        close(got[:n, b : b + 1], expected, "sums")
        assert not got[n:, b].any()
        for a, e in zip(states, ends, strict=True):
            close(a[:, b : b + 1], e, "sums")


def test_unbatched_reset_and_lengths():
    _, ours = pair(3, 5, batch_first=True)
    x, reset = randn(6, 3), torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool)
    expected, (h_n, c_n), cells = ours(
        x.unsqueeze(0), reset=reset.unsqueeze(0), lengths=torch.tensor([5]), return_cells=True
    )
    got = ours(x, reset=reset, lengths=torch.tensor(5), return_cells=True)
    close([got[0], *got[1], got[2]], [expected[0], h_n[:, 0], c_n[:, 0], cells[0]], "sums")


def test_outputs_large_enough_for_memory_that_is_used_again():
    """Two steps' outputs and gradients at once, and second derivatives: nobody's memory is another's."""
    theirs, ours = pair(3, 220)  # outputs of a megabyte
    x, lengths = randn(10, 60, 3), torch.randint(1, 11, (60,))
    results = []
    for module in (theirs, ours):
        results.append([])
        for scale in (1, 2):
            if module is theirs:
                packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
                output, _ = pad_packed_sequence(module(packed)[0], total_length=10)
            else:
                output, _ = module(x, lengths=lengths)
            inputs = [x, module.weight_hh_l0]
            gradients = torch.autograd.grad(output.pow(2).sum() * scale, inputs, create_graph=True)
            results[-1] += [output, *gradients, *torch.autograd.grad(gradients[0].pow(2).sum(), inputs)]
    close(*results[::-1], "derivatives")


def test_masks_wait_for_no_device():
    """Fake tensors have no values: reading one, or a shape that depends on one, raises there."""
    with FakeTensorMode():
        lstm = fastlstm.LSTM(3, 5, 2)
        x = torch.empty(6, 4, 3)
        output, (h_n, _) = lstm(x, lengths=torch.empty(4, dtype=torch.int64), reset=torch.empty(6, 4, dtype=torch.bool))
        assert output.shape == (6, 4, 5)
        assert h_n.shape == (2, 4, 5)


BOOLEANS = "reset must be booleans of shape (T, B), as a tensor, an array or a list"
INTEGERS = "lengths must be integers of shape (B,), as a tensor, an array or a list"
Z = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("arguments", "call", "error", "message"),
    [
        ({}, {"reset": [True]}, ValueError, "reset must have shape (T, B) = (5, 2), got (1,)"),
        ({}, {"reset": [[True], [True, False]]}, TypeError, f"{BOOLEANS}, got list"),
        ({}, {"reset": "start"}, TypeError, f"{BOOLEANS}, got str"),
        ({}, {"reset": [[0, 1]] * 5}, TypeError, f"{BOOLEANS}, got torch.int64"),
        ({}, {"reset": np.zeros((5, 2))}, TypeError, f"{BOOLEANS}, got torch.float64"),
        ({}, {"reset": Z}, TypeError, f"{BOOLEANS}, got torch.float32: a tensor's reset.bool() has them"),
        ({}, {"reset": torch.zeros(2, 5) > 0}, ValueError, "reset must have shape (T, B) = (5, 2), got (2, 5)"),
        ({"batch_first": True}, {"reset": Z.T > 0}, ValueError, "reset must have shape (B, T) = (5, 2), got (2, 5)"),
        ({"bidirectional": True}, {"reset": Z > 0}, ValueError, "needs a module of one direction, and this one is bi"),
        ({}, {"reset": torch.zeros(5, 2).int()}, TypeError, f"{BOOLEANS}, got torch.int32"),
        ({}, {"lengths": ["1", "2"]}, TypeError, f"{INTEGERS}, got list"),
        ({}, {"lengths": [[1], [1, 2]]}, TypeError, f"{INTEGERS}, got list"),
        ({}, {"lengths": {1, 2}}, TypeError, f"{INTEGERS}, got set"),
        ({}, {"lengths": [1.0, 2.0]}, TypeError, f"{INTEGERS}, got torch.float64"),
        ({}, {"lengths": np.ones(2) > 0}, TypeError, f"{INTEGERS}, got torch.bool"),
        ({}, {"lengths": torch.ones(2)}, TypeError, f"{INTEGERS}, got torch.float32"),
        ({}, {"lengths": torch.ones(2) > 0}, TypeError, f"{INTEGERS}, got torch.bool"),
        ({}, {"lengths": [1, 2, 3]}, ValueError, "lengths must have shape (B,) = (2,), got (3,)"),
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
