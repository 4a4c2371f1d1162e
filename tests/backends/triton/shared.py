"""What the tests of the Triton backend share. Importing it skips a module where there is no Triton.

Without a GPU the kernels run in Triton's interpreter on the CPU. It ignores the precision of a product, so of the
stepwise kernels the tests show the arithmetic alone. It cannot show races.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is made for Linux on x86-64")

from fastlstm.backends import reference
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Gradients, Layer, Run
from fastlstm.backends.triton import tiles
from tests.cells.layers import error
from tests.helpers.layers import flat

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPWISE = tiles.Stepwise(units=32, block_b=16, block_k=16, forward_warps=4, backward_warps=4, stages=3)
# Of outputs and of gradients, of the largest value or of 1: float32's roundings over sums of a few dozen terms; those
# of tf32's and fp16's 11 bits, of which a few add up in the steps. Gradients are products of three or four of these.
BOUNDS = {
    "ieee": (torch.float32, 2e-6, 2e-5),
    "tf32": (torch.float32, 3e-3, 6e-3),
    "native": (torch.float16, 4e-3, 1e-2),
}


def converted(part, dtype):
    """The tensors of a run, each of which may be None, in another type, on the device."""
    if isinstance(part, Run):
        return Run(*(converted(a, dtype) for a in part))
    if isinstance(part, tuple):
        return tuple(converted(a, dtype) for a in part)
    return None if part is None else part.to(DEVICE, dtype)


def on_device(layer):
    tensors = [None if a is None else a.to(DEVICE) for a in layer.tensors]
    return Layer.of(layer.cell, tensors, layer.reverse)


def needs_of(layer):
    """All gradients that there can be."""
    return Gradients.of(layer.cell, [a is not None for a in layer.tensors[:-2]])


def results(layer, grads, kind, needs=None):
    """What the kernels find: outputs and states, and gradients."""
    run = backend.forward(layer, True, kind)
    return flat(run), backend.backward(grads, layer, run, needs or needs_of(layer), kind).flat


def check(layer, grads, kind, needs=None):
    """Hold what the kernels find to the reference in float64, and return it."""
    dtype, *bounds = BOUNDS[kind]
    layer, grads, needs = on_device(layer.to(dtype)), converted(grads, dtype), needs or needs_of(layer)
    exact, found = layer.to(torch.double), results(layer, grads, kind, needs)
    run = reference.forward(exact, True)
    truth = flat(run), reference.backward(converted(grads, torch.double), exact, run, needs).flat
    for got, want, bound in zip(found, truth, bounds):
        assert [a is None for a in got] == [a is None for a in want]
        errors = [error(a.double(), b) for a, b in zip(got, want) if a is not None]
        assert max(errors, default=0) < bound, errors
    return found
