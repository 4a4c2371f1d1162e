"""A layer of any cell as the package runs it, by the pair of Functions, on the backend in plain PyTorch."""

import torch
from torch.func import jvp

from fastlstm.autograd.layer_function import differentiable
from fastlstm.autograd.rules import define
from fastlstm.backends import reference
from tests.cells.layers import GRADIENTS, ONE, OUTPUTS, curved, differentiated, error, flat, truth


def run(layer):
    """The outputs, the last states, and the other states of all steps: what `truth` returns."""
    define(layer.cell)
    results = differentiable(layer, True, "reference").flat
    return results[: 2 * len(layer.states)]


def plain(layer):
    """The same by torch's operations, which keep a graph of their own."""
    return flat(reference.forward(layer, True))


def check(case):
    """Hold outputs, gradients, second derivatives and tangents of a layer to autograd's through its rows."""
    results, second = [], []
    for layers in (truth, run):
        operands, wanted = case.with_gradients()
        grads = [g.clone().requires_grad_() for g in flat(case.grads)]
        got = layers(case.on(operands))
        first = differentiated(got, wanted, grads, create_graph=True)
        results.append((got, first))
        second.append(differentiated((curved(first),), [*wanted, *grads], ONE))
    assert max(map(error, results[1][0], results[0][0])) < OUTPUTS
    assert max(map(error, results[1][1], results[0][1])) < GRADIENTS
    assert max(map(error, second[1], second[0])) < GRADIENTS
    primals = tuple(a for a in case.operands if a is not None)
    tangents = tuple(map(torch.cos, primals))
    want, *found = (
        jvp(lambda *a, layers=layers: tuple(layers(case.filled(a))), primals, tangents)[1]
        for layers in (truth, run, plain)
    )
    assert all(max(map(error, got, want)) < GRADIENTS for got in found)
