"""What the tests of modules share: a pair of modules of the same weights, float64, and comparisons."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fastlstm
from tests.helpers.layers import BACKENDS
from tests.helpers.tolerances import F32, F64, close

both_backends = pytest.mark.parametrize("backend", BACKENDS)


OURS = {
    nn.LSTM: fastlstm.LSTM,
    nn.LSTMCell: fastlstm.LSTMCell,
    nn.GRU: fastlstm.GRU,
    nn.GRUCell: fastlstm.GRUCell,
    nn.RNN: fastlstm.Elman,
    nn.RNNCell: fastlstm.ElmanCell,
}
REFERENCE = partial(fastlstm.LSTM, backend="reference")  # which takes masks, and every transform


def pair(*sizes, like=nn.LSTM, exact=torch.float64, dtype=torch.float64, backend=None, **options):
    """What ours must equal, in the dtype `exact`, and ours in `dtype`: modules of the same weights, exactly.

    `like` is a module of torch or REFERENCE.
    """
    theirs = like(*sizes, **options).to(exact)
    ours = OURS.get(like, fastlstm.LSTM)(*sizes, dtype=dtype, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def torch_s_repr(ours):
    """The repr that torch's module has in the place of ours."""
    text = repr(ours)
    assert text.startswith("fastlstm.")
    return text.removeprefix("fastlstm.").replace("Elman", "RNN")


def copies_of(module):
    """Copies of a module in each way that there is: by Python, by pickle and by a file of torch."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)


def randn(*size, grad=True):
    return torch.randn(*size, dtype=torch.float64, requires_grad=grad)


def flat(result):
    """The tensors of what a layer or a cell returns, a packed sequence's data among them."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, torch.Tensor) else [a for each in result for a in flat(each)]


def assert_same_gradients(ours, theirs, got, expected, inputs):
    """`got` and `expected` are lists of outputs; their gradients by the same random directions are compared."""
    close(got, expected, "sums")
    directions = [torch.randn_like(a) for a in got]
    gradients = torch.autograd.grad(got, [*inputs, *ours.parameters()], directions, allow_unused=True)
    references = torch.autograd.grad(expected, [*inputs, *theirs.parameters()], directions, allow_unused=True)
    for a, b, x in zip(gradients, references, [*inputs, *ours.parameters()], strict=True):
        a, b = (torch.zeros_like(x) if g is None else g for g in (a, b))
        close(a, b, "gradients")


def modules_of(kind, backend, I, H, dtype=F32, **options):
    """A module, and one of the same weights in plain PyTorch and float64."""
    module = kind(I, H, dtype=dtype, backend=backend, **options)
    exact = kind(I, H, dtype=F64, backend="reference", **options)
    exact.load_state_dict(module.state_dict())
    return module, exact


def inputs_of(module, T, B, states=True):
    """x and the initial states, of numbers that every dtype has."""
    D, count = 2 if module.bidirectional else 1, 2 if isinstance(module, fastlstm.LSTM) else 1
    dtype = module.weight_hh_l0.dtype
    given = [torch.randn(D, B, module.hidden_size).to(dtype) for _ in range(count * states)]
    return [torch.randn(T, B, module.input_size).to(dtype), *given]


def called(module, x, states, **options):
    """The output and the last states, in a list."""
    hx = tuple(states) if isinstance(module, fastlstm.LSTM | fastlstm.LSTMCell) else states[0] if states else None
    return flat(module(x, hx or None if isinstance(hx, tuple) else hx, **options))


def results(module, inputs, directions, **options):
    """Outputs and the gradients of everything, in the module's dtype."""
    dtype = next(module.parameters()).dtype
    x, *states = leaves = [a.to(dtype).requires_grad_() for a in inputs]
    outputs = called(module, x, states, **options)
    directions = [a.to(dtype) for a in directions]
    return outputs + list(torch.autograd.grad(outputs, [*leaves, *module.parameters()], directions))


def same(got, want):
    return len(got) == len(want) and all(map(torch.equal, got, want))


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def both(module, x, hx=None):
    """What the module gives without gradients, and with: the second packs its weights at every call."""
    with torch.no_grad():
        packed = module(x, hx)
    return packed, module(x, hx)


def assert_same_bits(module, x, hx=None):
    for got, want in zip(*map(flat, both(module, x, hx)), strict=True):
        assert torch.equal(got, want.detach())
