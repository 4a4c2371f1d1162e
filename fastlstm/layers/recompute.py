"""Layers whose backward pass computes the gates again, so that a long sequence takes little memory.

A layer runs in parts of consecutive steps, and keeps its tensors, its output, and the states between parts. From the
last part to the first, the backward pass runs each forward once more, keeping the gates, and then backward.

Source: Chen et al., Training deep nets with sublinear memory cost, 2016.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm.autograd.layer_function import check_types, types_of
from fastlstm.autograd.modes import autocast_of, is_untransformed, wants_gradient
from fastlstm.backends.base import Layer, count_tensors

STEPS = 128  # of a part at least: in fewer, packing the weights would take a larger share

Results = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]  # the output, the last states, the other sequences
Runs = Callable[[Layer], Results]


def recomputed(layer: Layer, run: Runs) -> Results:
    """Return ``run(layer)`` for x (T, B, I), with as little kept for the backward pass as the module's text says; all
    under a second derivative, a transform of torch.func, a tracer or a compiler.
    """
    # first, since a tracer would take a comparison of the number of steps as fixed, and torch 2.9 compiles none of this
    if torch.compiler.is_compiling():
        return run(layer)
    if not wants_gradient(*layer.tensors) or not is_untransformed(*layer.tensors):
        return run(layer)
    steps = max(STEPS, round(layer.x.shape[0] ** 0.5))
    if layer.x.shape[0] <= steps:
        return run(layer)
    output, *results = _Recomputed.apply(run, layer.cell, layer.reverse, steps, *layer.tensors)
    states = len(layer.states)
    return output, tuple(results[:states]), tuple(results[states:])


def _segments_of(layer: Layer, steps: int) -> list[slice]:
    """Return the steps of each part, in the order in which they run."""
    segments = [slice(start, start + steps) for start in range(0, layer.x.shape[0], steps)]
    return segments[::-1] if layer.reverse else segments


def _segment(layer: Layer, steps: slice, states: tuple[Any, ...]) -> Layer:
    """Return some steps of a layer. A row that ends before them is held in all of them."""
    lengths = None if layer.lengths is None else (layer.lengths - steps.start).clamp(min=0)
    reset = None if layer.reset is None else layer.reset[steps]
    inputs = tuple(a[steps] for a in layer.inputs)
    return layer._replace(x=layer.x[steps], states=states, inputs=inputs, lengths=lengths, reset=reset)


class _Recomputed(Function):
    @staticmethod
    def forward(ctx: Any, run: Runs, cell: Any, reverse: bool, steps: int, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.run, ctx.cell, ctx.reverse, ctx.steps, ctx.autocast = run, cell, reverse, steps, autocast_of(tensors[0])
        layer = Layer.of(cell, tensors, reverse)
        T, states = layer.x.shape[0], layer.states
        boundary_states: list[Any] = []
        sequences: tuple[Tensor, ...] = ()
        for segment in _segments_of(layer, steps):
            boundary_states += states
            output, states, others = run(_segment(layer, segment, states))
            if not sequences:
                sequences = tuple(a.new_empty(T, *a.shape[1:]) for a in (output, *others))
            for whole, a in zip(sequences, (output, *others)):
                whole[segment] = a
        ctx.types = types_of((*tensors, *boundary_states))
        ctx.save_for_backward(*tensors, *boundary_states)
        ctx.set_materialize_grads(False)
        return sequences[0], *(a.clone() if a is b else a for a, b in zip(states, layer.states)), *sequences[1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count = count_tensors(ctx.cell)
        saved = ctx.saved_tensors  # read once, since hooks may unpack it anew each time
        check_types(ctx.types, saved)
        tensors, boundary_states = saved[:count], saved[count:]
        layer, needs = Layer.of(ctx.cell, tensors, ctx.reverse), ctx.needs_input_grad[4:]
        device = layer.x.device.type
        with torch.autocast(device, ctx.autocast, enabled=ctx.autocast is not None):
            if torch.is_grad_enabled():  # a second derivative is wanted, of everything at once
                gradients = _gradients(ctx.run, layer, needs, grads, True)
            else:
                gradients = _by_segments(ctx, layer, boundary_states, needs, grads)
        return None, None, None, None, *gradients


def _by_segments(ctx: Any, layer: Layer, boundary_states: Any, needs: Any, grads: Any) -> list[Tensor | None]:
    """Return the gradients of a layer's tensors, from those of its results."""
    states = len(layer.states)
    dh, of_states, of_others = grads[0], grads[1 : 1 + states], grads[1 + states :]
    first_state = len(layer.tensors) - 2 - len(layer.inputs) - states
    gradients: list[Any] = [torch.zeros_like(a) if need else None for a, need in zip(layer.tensors, needs)]
    for n in range(1, first_state):  # sums over all parts
        if gradients[n] is not None and gradients[n].itemsize == 2:
            gradients[n] = gradients[n].float()
    segments = _segments_of(layer, ctx.steps)
    for k in reversed(range(len(segments))):
        segment = _segment(layer, segments[k], boundary_states[k * states : (k + 1) * states])
        wanted = list(needs)
        if k > 0:
            wanted[first_state : first_state + states] = [True] * states
        dh_segment, *of_sequences = (None if a is None else a[segments[k]] for a in (dh, *of_others))
        segment_gradients = _gradients(ctx.run, segment, wanted, (dh_segment, *of_states, *of_sequences), False)
        of_states = segment_gradients[first_state : first_state + states]
        for n, (a, g) in enumerate(zip(gradients, segment_gradients)):
            if a is None or g is None or first_state <= n < first_state + states:
                continue
            if n == 0 or n >= first_state + states:  # x and inputs have a part of the steps each
                a[segments[k]] = g
            else:
                a += g
    for n in range(first_state, first_state + states):
        gradients[n] = of_states[n - first_state] if needs[n] else None
    return [g if g is None else g.to(a.dtype) for a, g in zip(layer.tensors, gradients)]


def _gradients(run: Runs, layer: Layer, needs: Any, grads: Any, create_graph: bool) -> list[Tensor | None]:
    tensors = list(layer.tensors)
    if create_graph:  # views: one tensor may be computed from another, and their gradients are those of the layer alone
        tensors = [a if a is None or not need else a.view_as(a) for a, need in zip(tensors, needs)]
    else:
        tensors = [a if a is None else a.detach().requires_grad_(bool(need)) for a, need in zip(tensors, needs)]
    with torch.enable_grad():
        output, last, others = run(Layer.of(layer.cell, tensors, layer.reverse))
    pairs = [(a, g) for a, g in zip((output, *last, *others), grads) if g is not None and a.requires_grad]
    wanted = [a for a, need in zip(tensors, needs) if need]
    if not pairs or not wanted:
        return [None] * len(tensors)
    outputs, incoming = zip(*pairs)
    wanted_gradients = iter(
        torch.autograd.grad(outputs, wanted, incoming, create_graph=create_graph, allow_unused=True)
    )
    return [next(wanted_gradients) if need else None for need in needs]
