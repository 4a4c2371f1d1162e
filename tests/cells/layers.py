"""What the tests of cells share: a layer's operands, and the truth: each row by itself, step by step, in float64."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlstm import cells
from fastlstm.backends.base import WEIGHTS, Gradients, Layer, Run, hidden_size
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


@dataclass
class Case:
    """One layer in one direction with random operands in float64, and random gradients for what comes out of it."""

    cell: Cell
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 5
    reverse: bool = False
    masked: bool = False
    zeros: bool = False
    bias: bool = True
    seed: int = 0
    heads: int = 1
    layer: Layer = field(init=False)
    grads: Run = field(init=False)

    def __post_init__(self) -> None:
        made = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made, dtype=torch.double)

        T, B, I, H, layout = self.T, self.B, self.I, self.H, self.cell.layout
        of_x, of_h, scale = len(layout.x_preacts) * H, len(layout.h_preacts) * H, H**-0.5
        weights: list[Any] = [random(of_x, I), random(of_h, H // self.heads), random(of_x), random(of_h)]
        weights = [a * scale if len(a) else None for a in weights]
        if not self.bias:
            weights[2:] = None, None
        for start in map(self.cell.initial.get, self.cell.params):  # near to a number that keeps the states bounded
            weights.append(start + 0.1 * start * random(H) if start else random(H))
        weights += [random(H, H // self.heads) * scale for _ in self.cell.products]
        states = [None if self.zeros else 0.5 * random(B, H) for _ in self.cell.states]
        if not self.zeros and "n" in self.cell.states:  # a normalizer is positive
            states[self.cell.states.index("n")] = random(B, H).abs() + 0.5
        lengths = torch.tensor([0, T, *torch.randint(0, T + 1, (B,), generator=made)])[:B] if self.masked else None
        reset = torch.rand(T, B, generator=made) < 0.3 if self.masked else None
        inputs = tuple(random(T, B, H) for _ in self.cell.inputs)
        self.layer = Layer(
            random(T, B, I), tuple(weights), tuple(states), lengths, reset, self.reverse, self.cell, inputs
        )
        of_states = [random(T, B, H) for _ in self.cell.states]
        self.grads = Run(of_states[0], tuple(random(B, H) for _ in states), tuple(of_states[1:]))

    @property
    def needs(self) -> Gradients:
        """All gradients that there can be."""
        return Gradients.of(self.cell, [a is not None for a in self.operands])

    @property
    def operands(self) -> list[Any]:
        """What may have a gradient: `Layer.tensors` without lengths and reset."""
        return list(self.layer.tensors[:-2])

    def on(self, operands: list[Any]) -> Layer:
        """The layer with other tensors in place of its operands."""
        return Layer.of(self.cell, (*operands, self.layer.lengths, self.layer.reset), self.reverse)

    def filled(self, tensors: Iterable[Tensor]) -> Layer:
        """The layer with these tensors in place of its operands that are tensors."""
        left = iter(tensors)
        return self.on([None if a is None else next(left) for a in self.operands])

    def with_gradients(self) -> tuple[list[Any], list[Tensor]]:
        """Copies of the operands that want gradients, and those of them that are tensors."""
        copies = [None if a is None else a.clone().requires_grad_() for a in self.operands]
        return copies, [a for a in copies if a is not None]


def stacked(cases: list[Case]) -> tuple[Layer, Run]:
    """One layer of several, whose weights have an axis of layers and whose rows lie side by side; and gradients."""

    def joined(parts: Any, axis: int) -> Any:
        return None if parts[0] is None else torch.cat(parts, axis)

    def each(records: list[Any], name: str, axis: int) -> tuple[Any, ...]:
        return tuple(joined(parts, axis) for parts in zip(*(getattr(a, name) for a in records)))

    first, layers, grads = cases[0], [case.layer for case in cases], [case.grads for case in cases]
    weights = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*(a.weights for a in layers)))
    masks = (joined([getattr(a, name) for a in layers], axis) for axis, name in enumerate(("lengths", "reset")))
    x, states, inputs = joined([a.x for a in layers], 1), each(layers, "states", 0), each(layers, "inputs", 1)
    layer = Layer(x, weights, states, *masks, first.reverse, first.cell, inputs)
    return layer, Run(joined([a.h for a in grads], 1), each(grads, "last", 0), each(grads, "saved", 1))


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


def flat(run: Run) -> tuple[Any, ...]:
    """What `truth` returns, of a run; of gradients too."""
    others = run.saved[: len(run.last) - 1]
    return run.h, *run.last, *others


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
