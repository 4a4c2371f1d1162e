"""What the layer tests share: a layer's inputs, the float64 truth,
and errors as fixed fractions of the largest value.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import fastlstm
from fastlstm import cells, lstm
from fastlstm.backends import base, reference

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
class Layer:
    """Random inputs of one layer in one direction, in float64, and random gradients for its outputs."""

    T: int
    B: int
    I: int
    H: int
    reverse: bool = False
    masked: bool = False
    bias: bool = True
    inputs: list[Tensor] = field(init=False)
    lengths: Tensor | None = field(init=False, default=None)
    reset: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        T, B, I, H = self.T, self.B, self.I, self.H
        bound = H**-0.5
        shapes = [(T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H)] + [(4 * H,), (4 * H,)] * self.bias
        scales = [1.0, 0.5, 0.5, bound, bound, bound, bound]
        # values that float32 holds exactly, so that every precision computes the same thing
        self.inputs = [(torch.randn(s) * k).double() for s, k in zip(shapes, scales)]
        if self.masked:
            self.lengths, self.reset = torch.randint(0, T + 1, (B,)), torch.rand(T, B) < 0.3
        self.gradients = [torch.randn(s).double() for s in ((T, B, H), (B, H), (B, H), (T, B, H))]

    def to(self, dtype: torch.dtype, requires_grad: bool = True) -> list[Tensor]:
        return [a.to(dtype).requires_grad_(requires_grad) for a in self.inputs]

    def run(self, inputs: list[Tensor], backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, h_n, c_n and the cell states."""
        x, h_0, c_0, *weights = inputs
        output, (h_n, c_n), cells = lstm(
            x,
            (h_0, c_0),
            *weights,
            lengths=self.lengths,
            reset=self.reset,
            reverse=self.reverse,
            return_cells=True,
            backend=backend,
        )
        return output, h_n, c_n, cells

    def truth(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same through autograd over the reference's steps, past every Function of ours."""
        run = reference.forward(self.record(inputs), True)
        return run.h, *run.last, run.saved[0]

    def record(self, inputs: list[Tensor]) -> base.Layer:
        """The inputs as a backend takes them."""
        x, h_0, c_0, *weights = inputs
        weights += [None] * (4 - len(weights))
        return base.Layer(x, tuple(weights), (h_0, c_0), self.lengths, self.reset, self.reverse, cells.lstm)


def draws(*size: int, values: int = 64, **options: bool) -> list[Layer]:
    """Layers of one size, as many as give every output and gradient `values` values in all.

    A value may cancel to almost nothing and still carries the rounding of its terms; the largest of many is as large as
    its terms make it. That is what errors are relative to.
    """
    T, B, I, H = size
    return [Layer(T, B, I, H, **options) for _ in range(-(-values // min(B * H, T * B * I, 4 * H)))]


def compare(layers: list[Layer], dtype: torch.dtype, backend: str) -> Iterator[tuple[str, Tensor, Tensor]]:
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


def float32_errors(layer: Layer, backend: str | None) -> tuple[float, float]:
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
