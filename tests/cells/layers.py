"""What the tests of cells share: a layer's operands, and the truth: each row by itself, step by step, in float64."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlstm import cells
from fastlstm.backends.base import WEIGHTS, Layer, hidden_size
from fastlstm.cells import CELLS, Cell, exp, relu, sigmoid, tanh
from fastlstm.cells import cell as declare
from fastlstm.cells.functions import mean
from tests.helpers.rnn import of_products, without_x


@declare(gates={"r": "xh", "z": "xh", "n_x": "x", "n_h": "h"}, states=("h",), params=("w", "b"), inputs=("gap",))
def gru_decay(r, z, n_x, n_h, h, w, b, gap):
    """A cell with params and an input: GRU-D's decay of the hidden state, after the products. Che et al., 2018."""
    h = h * exp(-relu(w * gap + b))
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n_x + r * n_h)
    return n + z * (h - n)


@declare(gates={"n": "xh"}, states=("h",))
def of_both(n, h):
    """Means of a row and of its heads."""
    return tanh(n - mean(n) + mean(h, of="head"))


OUTPUTS, GRADIENTS = 1e-12, 1e-11  # of sums of a few dozen terms in float64
ONE = (torch.ones((), dtype=torch.double),)
EVERY = (*CELLS, gru_decay, without_x, of_products)
every_cell = pytest.mark.parametrize("cell", EVERY, ids=lambda cell: cell.name)
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
masks = pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])


def truth(layer: Layer) -> tuple[Tensor, ...]:
    """The outputs, the last states, and the other states of all steps. Each row runs through its own steps alone, by
    the function that the author wrote.
    """
    T, B = layer.x.shape[:2]
    rows = [_row(layer.cell, layer, b, T if layer.lengths is None else int(layer.lengths[b])) for b in range(B)]
    return tuple(torch.stack(parts, -2) for parts in zip(*rows))


def _row(cell: Cell, layer: Layer, b: int, length: int) -> list[Tensor]:
    T, H = layer.x.shape[0], hidden_size(layer)
    states = [layer.x.new_zeros(H) if a is None else a[b] for a in layer.states]
    weights, taken = layer.weights, inspect.signature(cell).parameters
    after: list[list[Tensor]] = [[torch.zeros(0)] * T for _ in states]
    steps = range(T - 1, -1, -1) if layer.reverse else range(T)
    for t in steps:
        if t < length:
            if layer.reset is not None and layer.reset[t, b]:
                states = [a * 0 for a in states]
            preact = dict.fromkeys(cell.gates, torch.zeros(H, dtype=torch.double))
            for operand, weight, bias, value in (
                ("x", weights[0], weights[2], layer.x[t, b]),
                ("h", weights[1], weights[3], states[0]),
            ):
                gates = [gate for gate, sums in cell.gates.items() if operand in sums]
                for k, gate in enumerate(gates):
                    block = slice(k * H, (k + 1) * H)
                    preact[gate] = preact[gate] + weight[block] @ value + (0 if bias is None else bias[block])
            given = {**preact, **dict(zip(cell.states, states)), **dict(zip(cell.params, weights[WEIGHTS:]))}
            given |= {name: a[t, b] for name, a in zip(cell.inputs, layer.inputs)}
            of_products = zip(cell.products, weights[WEIGHTS + len(cell.params) :])
            given |= {name: weight.__matmul__ for name, weight in of_products}
            new = cell(**{name: given[name] for name in taken})
            states = [a.expand(H) for a in (new if isinstance(new, tuple) else (new,))]
        for place, a in zip(after, states):
            place[t] = a
    outputs = torch.stack([a if t < length else torch.zeros_like(a) for t, a in enumerate(after[0])])
    return [outputs, *states, *map(torch.stack, after[1:])]


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value there should be, or to 1 where that is less than 1."""
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.numel():
        return 0.0
    got, want = got.detach(), want.detach()
    difference = (got - want).abs().max() / want.abs().max().clamp(min=1.0)
    return float(torch.nan_to_num(difference, nan=float("inf")))


def differentiated(results: tuple[Tensor, ...], wanted: list[Tensor], grads: tuple[Tensor, ...], **options: Any) -> Any:
    """`torch.autograd.grad` with zeros where nothing depends."""
    pairs = [(a, g) for a, g in zip(results, grads) if a.requires_grad]
    if not pairs:
        return [torch.zeros_like(a) for a in wanted]
    results, grads = zip(*pairs)
    found = torch.autograd.grad(results, wanted, grads, allow_unused=True, **options)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(wanted, found)]


def curved(gradients):
    """A loss of gradients, whose own gradient is another for each of their values."""
    return sum((g * g.detach().cos()).sum() for g in gradients)


def pre(function, **others):
    """Declare `function` with two gates and a state."""
    return declare(**{"gates": {"a": "xh", "b": "xh"}, "states": ("h",), **others})(function)


MEANS = {
    "mean": lambda a, b: cells.mean(a * b) * a + cells.mean(cells.mean(b) - a),
    "linear": lambda a, b: cells.mean(-a * cells.mean(b) / (3.0 + cells.mean(a))) + b,
    "mean_alone": lambda a, b: cells.mean(a * b),
    "choice_by_a_mean": lambda a, b: cells.where(cells.mean(a) > cells.mean(b), a, b) * a,
    "variance": lambda a, b: cells.mean(cells.square(a - cells.mean(a))) * b,
    "layer_norm": lambda a, b: cells.layer_norm(a, weight=b, bias=0.5),
    "joint_layer_norm": lambda a, b: cells.layer_norm(a, b, a * b, weight=(b, 2.0, 1.0), bias=b)[1],
    "rms_norm": lambda a, b: cells.rms_norm(a, b, weight=b)[0],
    "norm_of_norm": lambda a, b: cells.layer_norm(cells.layer_norm(a) * b + cells.rms_norm(b)),
    "mean_of_head": lambda a, b: (
        cells.mean(a * b, "head") * a + cells.mean(-a / (3.0 + cells.mean(b)), of="head")
    ),  # here of one
    "norms_of_heads": lambda a, b: (
        cells.layer_norm(a * b, weight=b, of="head") + cells.mean(cells.rms_norm(b, of="head"))
    ),
}


def one(expression):
    """A cell of one expression."""

    @declare(gates={"a": "xh", "b": "xh"}, states=("h",))
    def cell(a, b):
        return expression(a, b)

    return cell
