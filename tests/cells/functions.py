"""Layers of any cell as the package runs them, by the pair of Functions in plain PyTorch; functions beside torch's."""

import math

import torch
from torch.func import jvp
from torch.nn import functional as F

from fastlstm import cells
from fastlstm.autograd.layer_function import differentiable
from fastlstm.autograd.rules import define
from fastlstm.backends import reference
from tests.cells.layers import GRADIENTS, ONE, OUTPUTS, curved, differentiated, error, truth
from tests.helpers.layers import flat


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


def with_half(function):
    return lambda x: function(x, torch.full_like(x, 0.5))


def clamped(low, high):
    """The clamp of torch before 2.14, whose derivative is 1 at both ends. That of later releases is 0 there."""
    return lambda x: torch.where((x >= low) & (x <= high), x, torch.clamp(x, low, high).detach())


OF_TORCH = {
    "sigmoid": (cells.sigmoid, torch.sigmoid),
    "tanh": (cells.tanh, torch.tanh),
    "relu": (cells.relu, torch.relu),
    "exp": (cells.exp, torch.exp),
    "log": (cells.log, torch.log),
    "sqrt": (cells.sqrt, torch.sqrt),
    "rsqrt": (cells.rsqrt, torch.rsqrt),
    "log_sigmoid": (cells.log_sigmoid, F.logsigmoid),
    "softplus": (cells.softplus, lambda x: F.softplus(x, threshold=80.0)),
    "square": (cells.square, torch.square),
    "cube": (lambda x: x**3, lambda x: torch.pow(x, 3)),
    "reciprocal": (lambda x: 1 / x, torch.reciprocal),
    "abs": (abs, torch.abs),
    "stop_gradient": (lambda x: cells.stop_gradient(x) * x, lambda x: x.detach() * x),
    "where": (lambda x: cells.where(x > 0.5, x, 2 * x), lambda x: torch.where(x > 0.5, x, 2 * x)),
    "where_number": (lambda x: cells.where(x <= 0.5, 1.0, x), lambda x: torch.where(x <= 0.5, 1.0, x)),
    "maximum": (lambda x: cells.maximum(x, 0.5), with_half(torch.maximum)),
    "minimum": (lambda x: cells.minimum(0.5, x), with_half(torch.minimum)),
    "clamp": (lambda x: cells.clamp(x, -3.0, 0.5), clamped(-3.0, 0.5)),
    "clamp_below": (lambda x: cells.clamp(x, min=3.0), clamped(3.0, math.inf)),
    "clamp_above": (lambda x: cells.clamp(x, max=3.0), clamped(-math.inf, 3.0)),
    "clamp_crossed": (lambda x: cells.clamp(x, 3.0, -3.0), clamped(3.0, -3.0)),
    "hard_sigmoid": (cells.hard_sigmoid, F.hardsigmoid),
}
