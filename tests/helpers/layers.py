"""What the layer tests share: a layer's inputs, the float64 truth,
and errors as fixed fractions of the largest value.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import fastlstm
from fastlstm import cells, lstm
from fastlstm.backends import base, reference
from fastlstm.backends.base import Gradients, Run
from fastlstm.cells import Cell

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
OUTPUTS = ("output", "h_n", "c_n", "cells")
NAMES = (*OUTPUTS, "dx", "dh_0", "dc_0", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh")
UNAVAILABLE = fastlstm.info()["backends"]  # by their names, why they cannot run here, or None


def needs(backend: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(UNAVAILABLE[backend] is not None, reason=str(UNAVAILABLE[backend]))


NOT_BUILT, needs_native = UNAVAILABLE["native"], needs("native")
CPU_BACKENDS = ("numba", pytest.param("native", marks=needs_native))
BACKENDS = (*CPU_BACKENDS, "reference")


@dataclass
class Case:
    """One layer of a cell in one direction: random operands in float64, of numbers that float32 has, so that every
    precision computes the same thing, and random gradients for what comes out of it.

    Attributes:
        seed: of the numbers, or None for others each time.
        inputs: the operands as users give them: x, the states unless they are `zeros`, the weights, and the cell's
            inputs.
        gradients: of the outputs, the last states, and the inner states of all steps.
    """

    cell: Cell
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 5
    reverse: bool = False
    masked: bool = False
    zeros: bool = False
    bias: bool = True
    seed: int | None = 0
    heads: int = 1
    lengths: Tensor | None = field(init=False, default=None)
    reset: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        made = torch.Generator()
        made.manual_seed(int(torch.randint(1 << 30, ())) if self.seed is None else self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made).double()

        cell, T, B, I, H, layout = self.cell, self.T, self.B, self.I, self.H, self.cell.layout
        of_x, of_h, scale = len(layout.x_preacts) * H, len(layout.h_preacts) * H, H**-0.5
        weights: list[Any] = [random(of_x, I), random(of_h, H // self.heads)]
        weights += [random(of_x), random(of_h)] if self.bias else [None, None]
        weights = [a * scale if a is not None and len(a) else None for a in weights]
        for start in map(cell.initial.get, cell.params):  # near to a number that keeps the states bounded
            weights.append(start + 0.1 * start * random(H) if start else random(H))
        weights += [random(H, H // self.heads) * scale for _ in cell.products]
        states = [0.5 * random(B, H) for _ in cell.states]
        if "n" in cell.states:  # a normalizer is positive
            states[cell.states.index("n")] = random(B, H).abs() + 0.5
        if self.masked:
            self.lengths = torch.tensor([0, T, *torch.randint(0, T + 1, (B,), generator=made)])[:B]
            self.reset = torch.rand(T, B, generator=made) < 0.3
        self.present = [a is not None for a in weights]
        inputs = [random(T, B, H) for _ in cell.inputs]
        weights = [a for a in weights if a is not None]
        given = random(T, B, I), *([] if self.zeros else states), *weights, *inputs
        self.inputs = [a.float().double() for a in given]
        of_states = [random(T, B, H) for _ in cell.states]
        self.gradients = [of_states[0], *(random(B, H) for _ in states), *of_states[1:]]

    def to(self, dtype: torch.dtype, requires_grad: bool = True) -> list[Tensor]:
        return [a.to(dtype).requires_grad_(requires_grad) for a in self.inputs]

    def record(self, inputs: list[Tensor]) -> base.Layer:
        """The inputs as a backend takes them."""
        given, cell = iter(inputs), self.cell
        x = next(given)
        states = tuple(None if self.zeros else next(given) for _ in cell.states)
        weights = tuple(next(given) if present else None for present in self.present)
        return base.Layer(x, weights, states, self.lengths, self.reset, self.reverse, cell, tuple(given))

    def run(self, inputs: list[Tensor], backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, h_n, c_n and the cell states of an LSTM."""
        x, h_0, c_0, *weights = inputs
        masks = {"lengths": self.lengths, "reset": self.reset, "reverse": self.reverse}
        output, (h_n, c_n), cells = lstm(x, (h_0, c_0), *weights, **masks, return_cells=True, backend=backend)
        return output, h_n, c_n, cells

    def truth(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The same through autograd over the reference's steps, past every Function of ours."""
        return flat(reference.forward(self.record(inputs), True))

    @property
    def layer(self) -> base.Layer:
        return self.record(self.inputs)

    @property
    def grads(self) -> Run:
        count = 1 + len(self.cell.states)
        return Run(self.gradients[0], tuple(self.gradients[1:count]), tuple(self.gradients[count:]))

    @property
    def needs(self) -> Gradients:
        """All gradients that there can be."""
        return Gradients.of(self.cell, [a is not None for a in self.operands])

    @property
    def operands(self) -> list[Any]:
        """What may have a gradient: `Layer.tensors` without lengths and reset."""
        return list(self.layer.tensors[:-2])

    def on(self, operands: list[Any]) -> base.Layer:
        """The layer with other tensors in place of its operands."""
        return base.Layer.of(self.cell, (*operands, self.lengths, self.reset), self.reverse)

    def filled(self, tensors: Iterable[Tensor]) -> base.Layer:
        """The layer with these tensors in place of its operands that are tensors."""
        left = iter(tensors)
        return self.on([None if a is None else next(left) for a in self.operands])

    def with_gradients(self) -> tuple[list[Any], list[Tensor]]:
        """Copies of the operands that want gradients, and those of them that are tensors."""
        copies = [None if a is None else a.clone().requires_grad_() for a in self.operands]
        return copies, [a for a in copies if a is not None]


Layer = partial(Case, cells.lstm, seed=None)  # one of an LSTM, which has other numbers each time


def stacked(cases: list[Case]) -> tuple[base.Layer, Run]:
    """One layer of several, whose weights have an axis of layers and whose rows lie side by side; and gradients."""

    def joined(parts: Any, axis: int) -> Any:
        return None if parts[0] is None else torch.cat(parts, axis)

    def each(records: list[Any], name: str, axis: int) -> tuple[Any, ...]:
        return tuple(joined(parts, axis) for parts in zip(*(getattr(a, name) for a in records)))

    first, layers, grads = cases[0], [case.layer for case in cases], [case.grads for case in cases]
    weights = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*(a.weights for a in layers)))
    masks = (joined([getattr(a, name) for a in layers], axis) for axis, name in enumerate(("lengths", "reset")))
    x, states, inputs = joined([a.x for a in layers], 1), each(layers, "states", 0), each(layers, "inputs", 1)
    layer = base.Layer(x, weights, states, *masks, first.reverse, first.cell, inputs)
    return layer, Run(joined([a.h for a in grads], 1), each(grads, "last", 0), each(grads, "saved", 1))


def flat(run: Run) -> tuple[Any, ...]:
    """What `truth` returns, of a run; of gradients too."""
    others = run.saved[: len(run.last) - 1]
    return run.h, *run.last, *others


def draws(*size: int, values: int = 64, **options: bool) -> list[Case]:
    """Layers of one size, as many as give every output and gradient `values` values in all.

    A value may cancel to almost nothing and still carries the rounding of its terms; the largest of many is as large as
    its terms make it. That is what errors are relative to.
    """
    T, B, I, H = size
    return [Layer(T, B, I, H, **options) for _ in range(-(-values // min(B * H, T * B * I, 4 * H)))]


def compare(layers: list[Case], dtype: torch.dtype, backend: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every output and gradient: its name, as `backend` computes it and as it should be, stacked over the layers."""
    results = []
    for layer in layers:
        inputs, exact = layer.to(dtype), layer.to(torch.double)
        got, want = layer.run(inputs, backend), layer.truth(exact)
        got += torch.autograd.grad(got, inputs, [g.to(dtype) for g in layer.gradients])
        want += torch.autograd.grad(want, exact, layer.gradients)
        results.append(zip(NAMES, got, want))
    for parts in zip(*results):
        yield parts[0][0], torch.stack([got for _, got, _ in parts]), torch.stack([want for _, _, want in parts])


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value there should be. NaN counts as infinitely wrong."""
    assert got.shape == want.shape, (got.shape, want.shape)
    difference = (got.double() - want).abs().max() if want.numel() else torch.tensor(0.0)
    return 0.0 if difference == 0 else torch.nan_to_num(difference / want.abs().max(), nan=float("inf")).item()


def float32_errors(layer: Case, backend: str | None) -> tuple[float, float]:
    """How far a backend in float32, or torch.nn.LSTM for None, is from float64: of the outputs and of the gradients, on
    an unmasked forward layer.
    """
    inputs, exact = layer.to(torch.float32), layer.to(torch.double)
    if backend is None:
        x, h_0, c_0, *weights = inputs
        module = torch.nn.LSTM(layer.I, layer.H)
        named = dict(zip(dict(module.named_parameters()), weights))
        output, states = functional_call(module, named, (x, (h_0[None], c_0[None])))
        got = output, *(a[0] for a in states)
    else:
        got = layer.run(inputs, backend)[:3]
    want = layer.truth(exact)[:3]
    grads = torch.autograd.grad(got, inputs, [g.float() for g in layer.gradients[:3]])
    want_grads = torch.autograd.grad(want, exact, layer.gradients[:3])
    return max(map(error, got, want)), max(map(error, grads, want_grads))
