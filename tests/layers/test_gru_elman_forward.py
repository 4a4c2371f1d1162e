"""The same calls, good and bad, to `torch.nn.GRU`, `torch.nn.RNN` and ours: results, exceptions and messages."""

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
from tests.helpers.modules import OURS, assert_same_gradients, pair, randn
from tests.helpers.tolerances import close
from tests.layers.test_masks import run_in_pieces

KINDS = [(nn.GRU, {}), (nn.RNN, {}), (nn.RNN, {"nonlinearity": "relu"})]
kinds = st.sampled_from(KINDS)
each = pytest.mark.parametrize(("torch_s", "options"), KINDS, ids=["GRU", "tanh", "relu"])
each_layer = pytest.mark.parametrize("torch_s", [nn.GRU, nn.RNN])


def leaves(x, hx):
    """Copies of the input and the state that take gradients, strides kept."""
    given = [x.data if isinstance(x, PackedSequence) else x, *([] if hx is None else [hx])]
    data, *states = copies = [a.detach().clone().requires_grad_() for a in given]
    return copies, x._replace(data=data) if isinstance(x, PackedSequence) else data, *(states or [None])


def flat(result):
    output, h_n = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n]


@settings(max_examples=80, deadline=None)
@given(kinds, calls(states_of=1))
def test_forward_and_gradients(kind, call):
    (torch_s, options), (arguments, x, hx, seed, training) = kind, call
    results, gradients = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        for module in pair(like=torch_s, **arguments, **options):
            module.train(training)
            torch.manual_seed(seed)  # the same seed drops the same features
            inputs, x_, hx_ = leaves(x, hx)
            results.append(module(x_, hx_))
            outputs = flat(results[-1])
            generator = torch.Generator().manual_seed(seed)
            cotangents = [torch.randn(a.shape, dtype=a.dtype, generator=generator) for a in outputs]
            weights = [*inputs, *module.parameters()]
            grads = torch.autograd.grad(outputs, weights, cotangents, allow_unused=True)
            gradients.append([torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)])
    assert_same(*results)
    for theirs, ours in zip(*gradients, strict=True):
        close(ours, theirs, "gradients")


@each
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (7, 1, 7, 100), (1, 7, 100, 7), (7, 7, 1, 7), (100, 1, 7, 1)])
def test_odd_sizes(torch_s, options, size):
    T, B, I, H = size
    theirs, ours = pair(I, H, like=torch_s, **options)
    x, h_0 = randn(T, B, I), randn(1, B, H)
    (output, h_n), (expected, end) = ours(x, h_0), theirs(x, h_0)
    assert_same_gradients(ours, theirs, [output, h_n], [expected, end], [x, h_0])


@settings(max_examples=100, deadline=None)
@given(
    kinds,
    calls(states_of=1).filter(lambda call: not isinstance(call[1], PackedSequence)),
    st.sampled_from([None, "dims", "no dims", "features", "dtype", "integers", "device", "none", "list"]),
    st.sampled_from([None, "dims", "no dims", "features", "rows", "batch", "device", "list"]),
)
def test_bad_calls(kind, call, x_fault, h_fault):
    (torch_s, options), (arguments, x, hx, seed, training) = kind, call
    x = wrong(x, x_fault, 1) if x_fault else x
    hx = hx if hx is None or h_fault is None else wrong(hx, h_fault, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        theirs, ours = pair(like=torch_s, **arguments, **options)

    def run(module):
        torch.manual_seed(seed)
        return module.train(training)(x, hx)

    assert_same_outcome(outcome(partial(run, theirs)), outcome(partial(run, ours)))


X, STATE = (5, 2, 3), (1, 2, 4)


@each_layer
@pytest.mark.parametrize(
    ("x", "h_0", "error", "words"),
    [
        ((3,), None, ValueError, "Expected input to be 2D or 3D, got 1D"),
        ((1, *X), None, ValueError, "Expected input to be 2D or 3D, got 4D"),
        ((5, 2, 7), None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 7"),
        (X, (1, 3, 4), RuntimeError, "Expected hidden size (1, 2, 4), got [1, 3, 4]"),
        (X, (1, 4), RuntimeError, "For batched 3-D input, hx should also be 3-D but got 2-D tensor"),
        ((5, 3), STATE, RuntimeError, "For unbatched 2-D input, hx should also be 2-D but got 3-D tensor"),
    ],
)
def test_errors_of_forward(torch_s, x, h_0, error, words):
    for cls in (torch_s, OURS[torch_s]):
        with pytest.raises(error, match=re.escape(words)):
            cls(3, 4)(torch.zeros(x), None if h_0 is None else torch.zeros(h_0))


@each_layer
def test_dtypes_must_agree(torch_s):
    for cls in (torch_s, OURS[torch_s]):
        with pytest.raises(ValueError, match=WRONG_DTYPE):
            cls(3, 4)(torch.zeros(X, dtype=torch.float64))


@each_layer
@pytest.mark.parametrize(
    ("hx", "name"), [((torch.zeros(STATE),), "tuple"), ([torch.zeros(STATE)], "list"), (0, "int"), ("h", "str")]
)
def test_a_state_is_a_tensor(torch_s, hx, name):
    ours = OURS[torch_s](3, 4)
    with pytest.raises(TypeError, match=f"hx must be a tensor, h_0, got {name}"):
        ours(torch.zeros(X), hx)
    with pytest.raises(TypeError, match=f"state must be a tensor, h_0, got {name}"):
        ours.step(torch.zeros(X[1:]), hx)


@each_layer
@pytest.mark.parametrize("packed", [False, True])
def test_dtypes_of_states_must_agree(torch_s, packed):
    x = torch.zeros(X)
    x = pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x
    with pytest.raises(RuntimeError, match=r"input tensor with torch.float32 and hidden tensor with"):
        OURS[torch_s](3, 4)(x, torch.zeros(STATE).double())


@each_layer
@pytest.mark.parametrize("size", [(5, 2, 3), (5, 3)])
def test_meta_device(torch_s, size):
    theirs, ours = pair(3, 4, num_layers=2, bidirectional=True, device="meta", like=torch_s)
    x = torch.zeros(size, dtype=torch.float64, device="meta")
    assert_same(theirs(x), ours(x))


@each_layer
@pytest.mark.parametrize("size", [(0, 2, 3), (0, 3)])
def test_no_time_steps(torch_s, size):
    _, ours = pair(3, 4, num_layers=2, bidirectional=True, like=torch_s)
    h_0 = torch.randn(4, *size[1:-1], 4, dtype=torch.float64)
    output, h_n = ours(torch.zeros(size, dtype=torch.float64), h_0)
    assert output.shape == (0, *size[1:-1], 8)
    assert torch.equal(h_n, h_0)


# what torch's have not


@each
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths_equal_packed(torch_s, options, bidirectional):
    theirs, ours = pair(3, 5, 2, bidirectional=bidirectional, like=torch_s, **options)
    x, h_0, lengths = randn(6, 4, 3), randn(4 if bidirectional else 2, 4, 5), torch.tensor([2, 6, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, end = theirs(packed, h_0)
    output, h_n = ours(x, h_0, lengths=lengths)
    for b, n in enumerate(lengths):
        assert not output[n:, b].any()
    got = pack_padded_sequence(output, lengths, enforce_sorted=False).data
    assert_same_gradients(ours, theirs, [got, h_n], [expected.data, end], [x, h_0])


@each
@pytest.mark.parametrize("batch_first", [False, True])
def test_reset_equals_pieces(torch_s, options, batch_first):
    theirs, ours = pair(3, 5, 2, like=torch_s, **options)
    ours.batch_first = batch_first
    x, h_0, reset = randn(6, 4, 3), randn(2, 4, 5), torch.rand(6, 4) < 0.4

    def one(x, state):
        output, h_n = theirs(x, state[0])
        return output, (h_n,)

    expected, (end,) = run_in_pieces(one, x, reset, (h_0,))
    output, h_n = ours(x.transpose(0, 1), h_0, reset=reset.T) if batch_first else ours(x, h_0, reset=reset)
    output = output.transpose(0, 1) if batch_first else output
    assert_same_gradients(ours, theirs, [output, h_n], [expected, end], [x, h_0])


@each
@pytest.mark.parametrize("batched", [True, False])
def test_steps_equal_forward(torch_s, options, batched):
    theirs, ours = pair(3, 5, 2, like=torch_s, **options)
    x = randn(6, *((4,) if batched else ()), 3)
    expected, end = theirs(x)
    outputs, state = [], None
    for x_t in x:
        h_t, state = ours.step(x_t, state)
        outputs.append(h_t)
    assert_same_gradients(ours, theirs, [torch.stack(outputs), state], [expected, end], [x])


@pytest.mark.parametrize(
    ("x_t", "state", "error", "message"),
    [
        ((1, 2, 3), None, ValueError, "GRU.step: Expected x_t to be 1D or 2D, got 3D instead"),
        ((2, 4), None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
        ((2, 3), (2, 5), RuntimeError, "Expected state size (1, 2, 5), got [2, 5]"),
        ((3,), (1, 1, 5), RuntimeError, "Expected state size (1, 5), got [1, 1, 5]"),
    ],
)
def test_bad_steps(x_t, state, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.GRU(3, 5).step(torch.zeros(x_t), None if state is None else torch.zeros(state))
    with pytest.raises(ValueError, match="step needs a module of one direction"):
        fastlstm.GRU(3, 5, bidirectional=True).step(torch.zeros(2, 3))


@each_layer
def test_later_calls_see_the_weights_as_they_are(torch_s):
    """Calls of one signature, without gradients, which may follow a plan."""
    theirs, ours = pair(3, 5, like=torch_s, exact=torch.float64, dtype=torch.float32)
    x, h_0 = torch.randn(4, 2, 3), torch.randn(1, 2, 5)
    with torch.no_grad():
        for call in ((x, h_0), (x,), (x, h_0)) * 2:
            expected, end = theirs(*(a.double() for a in call))
            close(ours(*call), (expected, end), "sums")
            close(ours.step(x[0], *call[1:])[0], expected[0], "sums")
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                p.mul_(0.5)
                q.mul_(0.5)
