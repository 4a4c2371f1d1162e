"""The same forward calls, good and bad, to `torch.nn.LSTM` and ours: results, exceptions and messages compared."""

import re
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from tests.helpers.contract import WRONG_DTYPE, assert_same, assert_same_outcome, calls, outcome, wrong
from tests.helpers.modules import pair
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def leaves(x, hx):
    """Copies of input and states that take gradients, strides kept."""
    copies = [
        a.detach().clone().requires_grad_() for a in (x.data if isinstance(x, PackedSequence) else x, *(hx or ()))
    ]
    data, *states = copies
    return copies, x._replace(data=data) if isinstance(x, PackedSequence) else data, type(hx)(states) if hx else None


def flat(result):
    output, (h_n, c_n) = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]


@settings(max_examples=150, deadline=None)
@given(calls())
def test_forward_and_gradients(call):
    arguments, x, hx, seed, training = call
    results, gradients = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        modules = pair(**arguments)
        for module in modules:
            module.train(training)
            torch.manual_seed(seed)  # the same seed drops the same features
            inputs, x_, hx_ = leaves(x, hx)
            results.append(module(x_, hx_))
            outputs = flat(results[-1])
            generator = torch.Generator().manual_seed(seed)
            cotangents = [torch.randn(a.shape, dtype=a.dtype, generator=generator) for a in outputs]
            weights = [*inputs, *module.parameters()]
            # with a dropout of 1 nothing depends on what lies below: a gradient of None or of zeros
            grads = torch.autograd.grad(outputs, weights, cotangents, allow_unused=True)
            gradients.append([torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)])
    assert_same(*results)
    for theirs, ours in zip(*gradients, strict=True):
        close(ours, theirs, "gradients")


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 2, 1], [1, 5, 2]])
def test_dropout_of_packed_input(lengths, bidirectional):
    """torch drops over the packed rows: the same seed must meet the same rows."""
    theirs, ours = pair(input_size=3, hidden_size=4, num_layers=3, dropout=0.5, bidirectional=bidirectional)
    packed = pack_padded_sequence(
        torch.randn(5, 3, 3, dtype=torch.float64), torch.tensor(lengths), enforce_sorted=False
    )
    results = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        results.append(module(packed))
    assert_same(*results)


@settings(max_examples=300, deadline=None)
@given(
    calls().filter(lambda call: not isinstance(call[1], PackedSequence)),
    st.sampled_from([None, "dims", "no dims", "features", "dtype", "integers", "device", "none", "list"]),
    st.sampled_from([None, "dims", "no dims", "features", "rows", "batch", "device", "none", "list"]),
    st.sampled_from([None, "dims", "no dims", "features", "rows", "batch", "device", "none", "list"]),
)
def test_bad_calls(call, x_fault, h_fault, c_fault):
    arguments, x, hx, seed, training = call
    if x_fault:
        x = wrong(x, x_fault, 1)
    if hx:
        hx = (wrong(hx[0], h_fault, 1) if h_fault else hx[0], wrong(hx[1], c_fault, 2) if c_fault else hx[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        theirs, ours = pair(**arguments)

    def run(module):
        torch.manual_seed(seed)
        return module.train(training)(x, hx)

    assert_same_outcome(outcome(partial(run, theirs)), outcome(partial(run, ours)))


X, STATE, UNBATCHED = (5, 2, 3), (1, 2, 4), (1, 4)


@pytest.mark.parametrize(
    ("x", "h_0", "c_0", "error", "words"),
    [
        ((3,), None, None, ValueError, "LSTM: Expected input to be 2D or 3D, got 1D instead"),
        ((1, *X), None, None, ValueError, "LSTM: Expected input to be 2D or 3D, got 4D instead"),
        ((5, 2, 7), None, None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 7"),
        ((5, 7), None, None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 7"),
        (X, (1, 3, 4), STATE, RuntimeError, "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]"),
        (X, (2, 2, 4), (2, 2, 4), RuntimeError, "Expected hidden[0] size (1, 2, 4), got [2, 2, 4]"),
        (X, STATE, (1, 2, 5), RuntimeError, "Expected hidden[1] size (1, 2, 4), got [1, 2, 5]"),
        (X, UNBATCHED, UNBATCHED, RuntimeError, "For batched 3-D input, hx and cx should also be 3-D but got (2-D, 2"),
        ((5, 3), STATE, STATE, RuntimeError, "For unbatched 2-D input, hx and cx should also be 2-D but got (3-D, 3"),
    ],
)
def test_errors_of_forward(x, h_0, c_0, error, words):
    hx = None if h_0 is None else (torch.zeros(h_0), torch.zeros(c_0))
    for cls in (nn.LSTM, fastlstm.LSTM):
        with pytest.raises(error, match=re.escape(words)):
            cls(3, 4)(torch.zeros(x), hx)


@pytest.mark.parametrize("cls", [nn.LSTM, fastlstm.LSTM])
def test_dtypes_must_agree(cls):
    with pytest.raises(ValueError, match=WRONG_DTYPE):
        cls(3, 4)(torch.zeros(X, dtype=torch.float64))


@pytest.mark.parametrize("call", [{"args": ()}, {"args": (1, 2, 3)}, {"args": (torch.zeros(1, 3),), "foo": 1}])
def test_wrong_forward_arguments(call):
    theirs, ours = pair(input_size=3, hidden_size=4)
    call = dict(call)
    args = call.pop("args")
    expected, got = outcome(lambda: theirs(*args, **call))[0], outcome(lambda: ours(*args, **call))[0]
    assert (type(got), str(got)) == (type(expected), str(expected))


def test_input_is_a_keyword():
    theirs, ours = pair(input_size=3, hidden_size=4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_same(theirs(input=x, hx=None), ours(input=x, hx=None))


@pytest.mark.parametrize("size", [(5, 2, 3), (5, 3)])
def test_meta_device(size):
    theirs, ours = pair(input_size=3, hidden_size=4, num_layers=2, bidirectional=True, device="meta")
    x = torch.zeros(size, dtype=torch.float64, device="meta")
    assert_same(theirs(x), ours(x))
