"""Layers of the Triton backend on emulated code, compared with the reference in float64."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Gradients, Layer, Run, held_steps
from tests.cells.layers import error
from tests.helpers import layers
from tests.ptx.device import Device, emulated

PRECISIONS = {"bf16": "native", "fp16": "native", "tf32": "tf32", "ieee": "ieee"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
# Of outputs and of gradients, of the largest value or of 1. bf16: 2^-9 = 2e-3 each for the input's product (|.| < 4,
# times a slope of 1/4), the gates, h and the product's h. Four of them, and what five steps carry on, make 2e-2. fp16
# and tf32: 2^-11 = 5e-4. ieee: float32's 6e-8 over sums of 200 terms of 0.1. Gradients are products of three or four
# such numbers, and sums over all steps: twice as much, in ieee five times.
BOUNDS = {"bf16": (2e-2, 4e-2), "fp16": (3e-3, 6e-3), "tf32": (3e-3, 6e-3), "ieee": (2e-6, 1e-5)}
# Where two arguments of these are equal, a gradient or a result jumps, and a rounding decides.
JUMPING, CHOOSING = {"relu", "maximum"}, {"greater", "at_least"}


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        mask: "lengths", "reset", "lengths+reset" or "".
        B: rows of each layer of a stack of G. 0 G is one layer.
        inner: whether the inner states of all steps have gradients, or with the output the last states alone.
        multiprocessors: of the chip. Of few, programs take 16 rows.
    """

    chip: int
    kind: str
    H: int
    cell: cells.Cell = cells.lstm
    mask: str = ""
    T: int = 2
    B: int = 9
    G: int = 0
    I: int = 40
    heads: int = 1
    reverse: bool = False
    bias: bool = True
    inner: bool = True
    multiprocessors: int = 132

    def __str__(self) -> str:
        shape = f"H{self.H}x{self.heads}-T{self.T}-B{self.B}x{self.G}-I{self.I}"
        flags = [name for name in ("reverse", "bias", "inner") if getattr(self, name)]
        return "-".join([self.cell.name, f"sm_{self.chip}", self.kind, shape, *[self.mask] * bool(self.mask), *flags])


def drawn(case: Case) -> tuple[Layer, Run]:
    """The layer, and gradients for what comes out of it. Its padding is NaN."""
    options = {name: getattr(case, name) for name in ("cell", "T", "B", "I", "H", "reverse", "bias", "heads")}
    layer, grads = layers.stacked([layers.Case(**options, masked=True, seed=seed) for seed in range(max(case.G, 1))])
    if not case.G:
        layer = layer._replace(weights=tuple(a if a is None else a[0] for a in layer.weights))
    masks = {name: getattr(layer, name) if name in case.mask else None for name in ("lengths", "reset")}
    layer, dtype = layer._replace(**masks).to(DTYPES[case.kind]), DTYPES[case.kind]
    if (held := held_steps(layer)) is not None:
        layer.x.masked_fill_(held, float("nan"))
    inner = tuple(a.to(dtype) if case.inner else None for a in grads.saved)
    return layer, Run(grads.h.to(dtype), tuple(a.to(dtype) for a in grads.last), inner)


def run(case: Case, only_backward: bool = False, **options: Any) -> Device:
    """The device after it ran a layer. What it found includes "numbers" where a bound is passed, and "input changed".

    Args:
        only_backward: the results of the forward pass are those of another run.
        options: of `emulated`.
    """
    layer, grads = drawn(case)
    needs = Gradients.of(case.cell, [a is not None for a in layer.tensors[:-2]])
    precision = PRECISIONS[case.kind]
    given = [a for a in (*layer.tensors, grads.h, *grads.last, *grads.saved) if a is not None]
    before = [a.clone() for a in given]
    results = forward_results(case) if only_backward else None
    with emulated(case.chip, multiprocessors=case.multiprocessors, **options) as device:
        if results is None:
            results = backend.forward(layer, True, precision)
        back = backend.backward(grads, layer, results, needs, precision)
    for a, old in zip(given, before):
        if not torch.equal(a.nan_to_num(7), old.nan_to_num(7)):
            device.findings.report("input changed", None, str(tuple(a.shape)))
    exact = layer.to(torch.double)
    want = reference.forward(exact, True)
    doubled = Run(grads.h.double(), *(tuple(a if a is None else a.double() for a in part) for part in grads[1:]))
    pairs = [
        (layers.flat(results), layers.flat(want)),
        (back.flat, reference.backward(doubled, exact, want, needs).flat),
    ]
    operations = case.cell.derived().forward.operations().keys()
    compared = 0 if CHOOSING & operations else 1 if JUMPING & operations else 2  # of outputs and gradients
    for (got, truth), bound in list(zip(pairs, BOUNDS[case.kind]))[:compared]:
        errors = [error(a.double(), b) for a, b in zip(got, truth, strict=True) if a is not None]
        if max(errors) >= bound:
            device.findings.report("numbers", None, str(errors))
    return device


@cache
def forward_results(case: Case) -> Run:
    """What the unchanged forward pass leaves for backward."""
    with emulated(case.chip, multiprocessors=case.multiprocessors):
        return backend.forward(drawn(case)[0], True, PRECISIONS[case.kind])
