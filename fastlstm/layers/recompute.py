"""Layers whose backward pass computes the gates again, so that a long sequence takes little memory.

A layer runs in parts of consecutive steps, each a checkpoint of torch: autograd keeps its input, its output, and the
states between parts. From the last part to the first, the backward pass runs each forward once more, keeping the gates,
and then backward.

Source: Chen et al., Training deep nets with sublinear memory cost, 2016.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlstm.autograd.layer_function import check_types, types_of
from fastlstm.autograd.modes import is_untransformed, wants_gradient
from fastlstm.backends.base import Layer
from fastlstm.torch_private import version_of

STEPS = 128  # of a part at least: in fewer, packing the weights would take a larger share

Results = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]  # the output, the last states, the other sequences
Runs = Callable[[Layer], Results]


def recomputed(layer: Layer, run: Runs) -> Results:
    """Return ``run(layer)`` for x (T, B, I), computed in parts whose gates the backward pass computes again. Under a
    transform of torch.func, a tracer or a compiler the layer runs whole, and keeps all gates.

    Args:
        layer: one layer in one direction.
        run: runs a layer, or a part of its steps.
    """
    # first, since a tracer would take a comparison of the number of steps as fixed, and torch 2.9 compiles none of this
    if torch.compiler.is_compiling():
        return run(layer)
    if not wants_gradient(*layer.tensors) or not is_untransformed(*layer.tensors):
        return run(layer)
    steps = max(STEPS, round(layer.x.shape[0] ** 0.5))
    if layer.x.shape[0] <= steps:
        return run(layer)
    return _in_parts(layer, run, steps)


def _in_parts(layer: Layer, run: Runs, steps: int) -> Results:
    narrow = [a is not None and a.itemsize == 2 for a in layer.weights]
    # autograd adds up the parts' gradients in float32
    layer = layer._replace(weights=tuple(a.float() if is_narrow else a for a, is_narrow in zip(layer.weights, narrow)))
    types, versions = types_of(layer.tensors), _versions(layer)

    def run_unchanged(part: Layer) -> Results:
        check_types(types, layer.tensors)
        if _versions(layer) != versions:
            raise RuntimeError("a tensor that `recompute` reads once more has been modified by an inplace operation")
        weights = tuple(a.to(part.x.dtype) if is_narrow else a for a, is_narrow in zip(layer.weights, narrow))
        return run(part._replace(weights=weights))

    parts = [*zip(*(a.split(steps) for a in (layer.x, *layer.inputs)))]
    states, results = layer.states, [()] * len(parts)
    for k in reversed(range(len(parts))) if layer.reverse else range(len(parts)):
        x, *inputs = parts[k]
        # a row that ends before these steps is held in all of them
        lengths = None if layer.lengths is None else (layer.lengths - k * steps).clamp(min=0)
        reset = None if layer.reset is None else layer.reset[k * steps : (k + 1) * steps]
        part = layer._replace(x=x, inputs=tuple(inputs), states=states, lengths=lengths, reset=reset)
        output, states, others = checkpoint(run_unchanged, part, use_reentrant=False, preserve_rng_state=False)
        results[k] = output, *others
    output, *others = map(torch.cat, zip(*results))
    return output, states, (*others,)


def _versions(layer: Layer) -> list[int]:
    """Return a number for each tensor of a layer, which is another one after a write."""
    return [version_of(a) for a in layer.tensors if a is not None]
