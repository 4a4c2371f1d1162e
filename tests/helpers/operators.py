"""What the tests of `fastlstm.patch_operators` share."""

import copy

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from tests.helpers.contract import LAYERS
from tests.helpers.modules import flat, same


def layer(name, *sizes, **options):
    kind, more = LAYERS[name]
    return kind(*sizes, **more, **options)


def ours(module):
    """The same module, of fastlstm's classes."""
    return fastlstm.replace(copy.deepcopy(module))


def packed(x, batch_first=False):
    """Rows of other lengths in no order, for x of 6 steps and 6 rows."""
    return pack_padded_sequence(x, torch.tensor([3, 6, 1, 4, 6, 2]), batch_first, enforce_sorted=False)


def of(model, x, *states, given=lambda x: x):
    """The outputs of a model, and the gradients of its input, its states and its parameters.

    The model takes `given(x)`, and several states as a tuple.
    """
    x, *states = leaves = [a.clone().requires_grad_() for a in (x, *states)]
    hx = [tuple(states) if len(states) > 1 else states[0]] if states else []
    outputs = flat(model(given(x), *hx))
    total, wanted = sum(a.double().cos().sum() for a in outputs), [*leaves, *model.parameters()]
    gradients = torch.autograd.grad(total, wanted, retain_graph=True)
    assert same(torch.autograd.grad(total, wanted), gradients)  # a graph serves twice
    return [*outputs, *gradients]
