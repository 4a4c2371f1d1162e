"""A layer of any cell as a pair of autograd Functions, made of nothing but what is derived: `reference` and
`linearized`. What comes out of `Layers` is differentiable to any order.
"""

import torch
from torch.autograd import Function

from fastlstm.cells import reference
from fastlstm.cells.linearized import Along, Linearized
from fastlstm.cells.records import Gradients, Layer, Run


def total(a, b):
    return a if b is None else b if a is None else a + b


class LayerBackward(Function):
    """The gradients of a layer's operands, from those of what came out, the operands and the run."""

    @staticmethod
    def forward(cell, reverse, needs, *tensors):
        grads, layer, run = taken_apart(cell, reverse, tensors)
        return reference.backward(cell, grads, layer, run, needs).flat

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, ctx.reverse, ctx.needs, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *v):
        cell, tensors = ctx.cell, ctx.saved_tensors
        grads, layer, run = taken_apart(cell, ctx.reverse, tensors)
        along = Along(*Gradients.of(cell, v))
        around = Linearized(cell, layer, (run.h, *run.kept[:-1]))
        dsums, d = around.gradient((grads.h, *grads.kept), grads.last)
        preact, states = around.tangent(around.preact_tangent(along, None), along)
        prev = around.before(states, along.states)
        changes = around.curvature(d, preact, prev, along)
        wanted = Gradients.of(cell, [a is not None for a in layer.tensors[:-2]])
        found = around.products(changes, dsums, along, prev[0], wanted)
        after, first = around.after(found.states)
        last = around.order[-1]
        incoming = around.outputs(states[0]), *(a[last] for a in states), *states[1:]
        incoming = [None if a is None else g for a, g in zip(tensors, incoming)]
        first = [None if a is None else g for a, g in zip(layer.states, first)]
        of_operands = found._replace(states=tuple(first)).flat
        return None, None, None, *incoming, *of_operands, None, None, *after, None

    @staticmethod
    def jvp(ctx, _, __, ___, *tangents):
        cell, tensors = ctx.cell, ctx.saved_tensors
        grads, layer, run = taken_apart(cell, ctx.reverse, tensors)
        grads_t, layer_t, run_t = taken_apart(cell, ctx.reverse, tangents)
        along = Along(layer_t.x, layer_t.weights, layer_t.states, layer_t.inputs)
        states = run.h, *run.kept[:-1]
        states_t = [torch.zeros_like(a) if t is None else t for a, t in zip(states, (run_t.h, *run_t.kept[:-1]))]
        around = Linearized(cell, layer, states)
        dsums, d = around.gradient((grads.h, *grads.kept), grads.last)
        prev = around.before(states_t, along.states)
        changes = around.curvature(d, around.preact_tangent(along, prev[0]), prev, along)
        others = around.products(changes, dsums, along, prev[0], ctx.needs)
        after, first = around.after(others.states)
        incoming = total(after[0], grads_t.h), *grads_t.last, *map(total, after[1:], grads_t.kept)
        linear = LayerBackward.apply(cell, ctx.reverse, ctx.needs, *incoming, *tensors[len(incoming) :])
        others = others._replace(states=first).flat
        return tuple(None if a is None else total(a, b) for a, b in zip(linear, others))


class Layers(Function):
    """The outputs, the last states, the other states of all steps, and what is saved."""

    @staticmethod
    def forward(cell, reverse, *operands):
        run = reference.forward(cell, Layer.of(cell, operands, reverse), True)
        return run.h, *run.last, *run.kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cell, ctx.reverse, *operands = inputs
        h, *others = output
        kept = others[len(ctx.cell.states) :]
        ctx.mark_non_differentiable(kept[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, h, *kept)
        ctx.save_for_forward(*operands, h, *kept)
        ctx.count = len(operands)

    @staticmethod
    def backward(ctx, *grads):
        needs = Gradients.of(ctx.cell, ctx.needs_input_grad[2 : ctx.count])
        found = LayerBackward.apply(ctx.cell, ctx.reverse, needs, *grads[:-1], *ctx.saved_tensors)
        return None, None, *found, None, None

    @staticmethod
    def jvp(ctx, _, __, *tangents):
        *tensors, _ = ctx.saved_tensors
        layer, states = Layer.of(ctx.cell, tensors[: ctx.count], ctx.reverse), tensors[ctx.count :]
        moved = Layer.of(ctx.cell, tangents, ctx.reverse)
        along = Along(moved.x, moved.weights, moved.states, moved.inputs)
        around = Linearized(ctx.cell, layer, states)
        _, states = around.tangent(around.preact_tangent(along, None), along)
        last = around.order[-1]
        return around.outputs(states[0]), *(a[last].clone() for a in states), *states[1:], None


def taken_apart(cell, reverse, tensors):
    """The gradients of a run, the layer, and the run, of `LayerBackward`'s tensors."""
    states, count = len(cell.states), 2 * len(cell.states)
    dh, *grads = tensors[:count]
    *operands, h = tensors[count : len(tensors) - states]
    others = tensors[len(tensors) - states :]
    grads = Run(dh, tuple(grads[:states]), tuple(grads[states:]))
    return grads, Layer.of(cell, operands, reverse), Run(h, (), tuple(others))


def run(cell, layer):
    """`layer` by the Functions: what `truth` returns."""
    return Layers.apply(cell, layer.reverse, *layer.tensors)[:-1]
