"""The same forward calls, good and bad, to torch's layers and ours, and where ours differ on purpose."""

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
from tests.helpers.contract import LAYERS, WRONG_DTYPE, assert_same, assert_same_outcome, calls, outcome, wrong
from tests.helpers.layers import TORCH
from tests.helpers.modules import OURS, flat, pair, randn
from tests.helpers.threads import on_any_split, splits
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
each = pytest.mark.parametrize(("torch_s", "options"), LAYERS.values(), ids=LAYERS)
each_layer = pytest.mark.parametrize("torch_s", [nn.LSTM, nn.GRU, nn.RNN])
x_faults = [None, "dims", "no dims", "features", "dtype", "integers", "device", "none", "list"]
state_faults = st.sampled_from([None, "dims", "no dims", "features", "rows", "batch", "device", "none", "list"])


def leaves(x, hx):
    """Copies of the input and the states that take gradients, strides kept."""
    states = [] if hx is None else [hx] if isinstance(hx, torch.Tensor) else hx
    copies = [a.detach().clone().requires_grad_() for a in (x.data if isinstance(x, PackedSequence) else x, *states)]
    data, *states = copies
    hx = hx if hx is None else states[0] if isinstance(hx, torch.Tensor) else type(hx)(states)
    return copies, x._replace(data=data) if isinstance(x, PackedSequence) else data, hx


def random_states(torch_s, *size):
    """Initial states as a layer takes them."""
    return (randn(*size), randn(*size)) if torch_s is nn.LSTM else randn(*size)


@settings(max_examples=120, deadline=None)
@given(calls(), splits)
@on_any_split
def test_forward_and_gradients(call):
    torch_s, arguments, x, hx, seed, training = call
    results, gradients = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        for module in pair(like=torch_s, **arguments):
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
    close(*gradients[::-1], "gradients")


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 2, 1], [1, 5, 2]])
def test_dropout_of_packed_input(lengths, bidirectional):
    """torch drops over the packed rows: the same seed must meet the same rows."""
    theirs, ours = pair(3, 4, num_layers=3, dropout=0.5, bidirectional=bidirectional)
    packed = pack_padded_sequence(randn(5, 3, 3, grad=False), torch.tensor(lengths), enforce_sorted=False)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(7)
        results.append(module(packed))
    assert_same(*results)


@settings(max_examples=200, deadline=None)
@given(
    calls().filter(lambda call: not isinstance(call[2], PackedSequence)), st.sampled_from(x_faults), state_faults,
    state_faults,
)  # fmt: skip
def test_bad_calls(call, x_fault, h_fault, c_fault):
    torch_s, arguments, x, hx, seed, training = call
    x = wrong(x, x_fault, 1) if x_fault else x
    if isinstance(hx, torch.Tensor):
        hx = wrong(hx, h_fault, 1) if h_fault not in (None, "none") else hx
    elif hx:
        hx = (wrong(hx[0], h_fault, 1) if h_fault else hx[0], wrong(hx[1], c_fault, 2) if c_fault else hx[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        theirs, ours = pair(like=torch_s, **arguments)

    def run(module):
        torch.manual_seed(seed)
        return module.train(training)(x, hx)

    assert_same_outcome(outcome(partial(run, theirs)), outcome(partial(run, ours)))


X, STATE = (5, 2, 3), (1, 2, 4)


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (((1, 3, 4), STATE), "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]"),
        (((2, 2, 4), (2, 2, 4)), "Expected hidden[0] size (1, 2, 4), got [2, 2, 4]"),
        (((1, 2, 5), (1, 2, 5)), "Expected hidden[0] size (1, 2, 4), got [1, 2, 5]"),
        ((STATE, (1, 2, 5)), "Expected hidden[1] size (1, 2, 4), got [1, 2, 5]"),
        (((1, 4), (1, 4)), "hx and cx should also be 3-D but got (2-D, 2-D)"),
    ],
)
@pytest.mark.parametrize("lengths", [[5, 5], [5, 3], [3, 5]])
def test_states_of_packed_input_are_checked(states, words, lengths):
    packed = pack_padded_sequence(torch.randn(X), torch.tensor(lengths), enforce_sorted=False)
    with pytest.raises(RuntimeError, match=re.escape(words)):
        fastlstm.LSTM(3, 4)(packed, tuple(map(torch.zeros, states)))


@pytest.mark.parametrize("call", [{"args": ()}, {"args": (1, 2, 3)}, {"args": (torch.zeros(1, 3),), "foo": 1}])
def test_wrong_forward_arguments(call):
    call = dict(call)
    args = call.pop("args")
    expected, got = (outcome(lambda module=module: module(*args, **call))[0] for module in pair(3, 4))
    assert (type(got), str(got)) == (type(expected), str(expected))


def test_input_is_a_keyword():
    theirs, ours = pair(3, 4)
    x = randn(*X, grad=False)
    assert_same(theirs(input=x, hx=None), ours(input=x, hx=None))


@each_layer
@pytest.mark.parametrize("size", [(5, 2, 3), (5, 3)])
def test_meta_device(torch_s, size):
    theirs, ours = pair(3, 4, num_layers=2, bidirectional=True, device="meta", like=torch_s)
    x = torch.zeros(size, dtype=torch.float64, device="meta")
    assert_same(theirs(x), ours(x))


# where ours differ on purpose, and what torch's have not


@pytest.mark.skipif(TORCH < (2, 11), reason="torch 2.10 and older give no advice on dtypes")
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_input_of_integers(dtype):
    """Nobody can convert a model to integers, and torch advises it."""
    advice = r"does not match weight dtype \(torch.float32\)\. Convert input: input.to\(torch.float32\)"
    x, rnn = torch.ones(X, dtype=dtype), fastlstm.RNN(fastlstm.cells.gru, 3, 4)
    for ours in (fastlstm.LSTM(3, 4), fastlstm.GRU(3, 4), rnn, fastlstm.quantize(nn.LSTM(3, 4))):
        for call in (ours, lambda x, ours=ours: ours.step(x[0])):
            with pytest.raises(ValueError, match=f"{advice}$"):
                call(x)
    with pytest.raises(ValueError, match=f"{advice}$"):
        fastlstm.LSTM(3, 4)(x, (torch.zeros(STATE), torch.zeros(STATE)))
    with pytest.raises(ValueError, match=rf"{advice}, or convert model: model.to\(torch.float64\)$"):
        fastlstm.LSTM(3, 4)(x.double())


def test_packed_input_is_checked():
    ours = fastlstm.LSTM(3, 4)
    x = torch.randn(5, 2, 4)
    equal, unequal = (pack_padded_sequence(x, torch.tensor(lengths)) for lengths in ([5, 5], [5, 3]))
    for packed in (equal, unequal):  # torch returns numbers where the lengths are equal
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 3, got 4"):
            ours(packed)
    with pytest.raises(ValueError, match=WRONG_DTYPE):
        ours(pack_padded_sequence(x[..., :3].double(), torch.tensor([5, 3])))
    for data in (x[..., 0], x[..., None, :3]):
        with pytest.raises(RuntimeError, match=f"input must have 2 dimensions, got {data.dim() - 1}"):
            ours(pack_padded_sequence(data, torch.tensor([5, 3])))
    with pytest.raises(RuntimeError, match="found input tensor at meta and parameter tensor at cpu"):
        ours(PackedSequence(torch.zeros(8, 3, device="meta"), torch.tensor([2, 2, 2, 1, 1])))
    with pytest.raises(RuntimeError, match="must be int64"):
        ours(PackedSequence(torch.randn(6, 3), torch.tensor([3, 2, 1], dtype=torch.int32)))


@pytest.mark.parametrize(
    ("sizes", "rows"), [([3, 1, 2], 6), ([2, 3, 1], 6), ([3, 1, 3], 9), ([3, 2, 1], 9), ([3, 2, -1], 4), ([], 0)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_batch_sizes_of_packed_input_are_checked(sizes, rows, dtype):
    packed = PackedSequence(torch.randn(rows, 3), torch.tensor(sizes, dtype=dtype))
    with pytest.raises(RuntimeError, match=rf"must sum up to the rows of its data, {rows}, got {dtype} \["):
        fastlstm.LSTM(3, 4)(packed)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("torch_s", "proj_size"), [(nn.LSTM, 0), (nn.LSTM, 2), (nn.GRU, 0), (nn.RNN, 0)])
@pytest.mark.parametrize("size", [(0, 2, 3), (0, 3), (0, 0, 3)])
def test_no_time_steps(size, torch_s, proj_size, bidirectional):
    """torch: "Expected sequence length to be larger than 0 in RNN"."""
    is_lstm, D, H_out, batch = torch_s is nn.LSTM, 2 if bidirectional else 1, proj_size or 4, size[1:-1]
    options = {"num_layers": 2, "bidirectional": bidirectional} | ({"proj_size": proj_size} if is_lstm else {})
    _, ours = pair(3, 4, like=torch_s, **options)
    x = torch.zeros(size, dtype=torch.float64)
    output, *states = flat(ours(x))
    assert output.shape == (0, *batch, D * H_out)
    assert states[0].shape == (2 * D, *batch, H_out)
    assert not any(a.any() for a in states)
    given = [torch.randn_like(a) for a in states]
    output, last, *cells = ours(x, tuple(given) if is_lstm else given[0], **{"return_cells": True} if is_lstm else {})
    assert all(map(torch.equal, last if is_lstm else [last], given))
    assert [a.shape for a in cells] == [(0, *batch, D * 4)] * is_lstm


TUPLE = "hx must be a tuple of two tensors, h_0 and c_0, got"


@pytest.mark.parametrize(
    ("torch_s", "make", "error", "message"),
    [  # torch raises in other words, and promotes those of two types
        (nn.LSTM, lambda h: torch.stack([h, h]), TypeError, f"{TUPLE} Tensor"),
        (nn.LSTM, lambda h: h, TypeError, f"{TUPLE} Tensor"),
        (nn.LSTM, lambda h: {0: h, 1: h}, TypeError, f"{TUPLE} dict"),
        (nn.LSTM, lambda h: (h,), RuntimeError, "lstm expects two hidden states"),
        (nn.LSTM, lambda h: (h, h, h), RuntimeError, "lstm expects two hidden states"),
        (nn.LSTM, lambda h: (h.double(), h), RuntimeError, "found input tensor with torch.float32 and hidden tensor"),
        (nn.LSTM, lambda h: (h, h.double()), RuntimeError, "found input tensor with torch.float32 and hidden tensor"),
        *(
            (torch_s, make, error, message)
            for torch_s in (nn.GRU, nn.RNN)
            for make, error, message in (
                (lambda h: (h,), TypeError, "hx must be a tensor, h_0, got tuple"),
                (lambda h: [h], TypeError, "hx must be a tensor, h_0, got list"),
                (lambda h: 0, TypeError, "hx must be a tensor, h_0, got int"),
                (lambda h: "h", TypeError, "hx must be a tensor, h_0, got str"),
                (lambda h: h.double(), RuntimeError, "input tensor with torch.float32 and hidden tensor with"),
            )
        ),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_unsuitable_states(torch_s, make, error, message, packed):
    x, ours, hx = torch.zeros(X), OURS[torch_s](3, 4), make(torch.zeros(STATE))
    with pytest.raises(error, match=message):
        ours(pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x, hx)
    if torch_s is not nn.LSTM and error is TypeError:
        with pytest.raises(TypeError, match=message.replace("hx", "state")):
            ours.step(x[0], hx)
