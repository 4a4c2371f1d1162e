"""The operators' own rules of differentiation and of `vmap`, and the operator that a trace records. With them a loaded
export, which holds operators and no Functions, can be trained and takes `vmap`, as a module does.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlstm.autograd import operators
from fastlstm.autograd.batching import backward_rule, forward_rule
from fastlstm.autograd.layer_function import LayerBackward, LayerFunction, differentiable
from fastlstm.autograd.modes import wants_autograd
from fastlstm.backends import reference
from fastlstm.backends.base import Layer, Run
from fastlstm.cells.library import CELLS, lstm_projected
from fastlstm.cells.spec import Cell, when_declared
from fastlstm.torch_private import transformed

Optional = Tensor | None


def define(cell: Cell) -> None:
    """Define the operators of a cell with their rules, unless they are there."""
    if cell in operators.by_cell:
        return
    defined = operators.define_for(cell)

    def setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *layer, ctx.saved, backend = inputs
        LayerFunction.setup_context(ctx, (*layer, cell, backend), output)
        ctx.arguments = len(inputs)

    def backward_of_forward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        if not ctx.saved:
            raise RuntimeError(
                f"fastlstm::{names[0]} was recorded with save=False: to train an export, record it with gradients"
            )
        return LayerFunction.backward(ctx, *grads)

    def setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        LayerBackward.setup_context(ctx, (*inputs[:-2], cell, *inputs[-2:]), output)
        ctx.arguments = len(inputs)

    def backward_of_backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        wanted = (g if need else None for g, need in zip(grads, ctx.needs))
        return LayerBackward.backward(ctx, *wanted)

    def run(*args: Any) -> tuple[Tensor, ...]:
        return operators.forward(*args[:-2], cell, *args[-2:])

    def gradients(*args: Any) -> tuple[Optional, ...]:
        return operators.backward(*args[:-2], cell, *args[-2:])

    def vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return forward_rule(cell, run, run, info.batch_size, in_dims, *args)

    def vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        outputs, dims = backward_rule(cell, gradients, gradients, info.batch_size, in_dims, *args)
        like = next(a for a in args if isinstance(a, Tensor))
        return tuple(like.new_empty(0) if a is None else a for a in outputs), dims

    names = operators.name_of(cell, "forward"), operators.name_of(cell, "backward")
    for name, function, setup, gradient, rule in (
        (names[0], defined.run, setup_forward, backward_of_forward, vmap_forward),
        (names[1], defined.gradients, setup_backward, backward_of_backward, vmap_backward),
    ):
        operators.differentiate(name, function, gradient, setup)
        torch.library.register_vmap(f"fastlstm::{name}", rule, lib=operators.LIBRARIES[name])

    # What `torch.jit.trace` records. It decomposes at each call, so that one trace serves training and inference.
    results = operators.tensors_of(2 * len(cell.states))
    schema = f"({operators.schema_of(cell)}, bool reverse, bool inner_states, str backend) -> {results}"
    name = operators.name_of(cell, "layer")
    layer = operators.define(name, schema, partial(_layer, cell), "CompositeImplicitAutograd")
    operators.by_cell[cell] = defined._replace(layer=layer)


def _layer(cell: Cell, *args: Any) -> tuple[Tensor, ...]:
    """Return the outputs, the last states and, empty unless the argument `inner_states` is true, those of all steps."""
    *tensors, reverse, inner_states, backend = args
    layer = Layer.of(cell, tensors, reverse)
    if transformed() and wants_autograd(*tensors):  # torch.func lets no Function run among the parts of an operator
        *results, _ = reference.forward(layer, True).flat
        run = Run.of(len(layer.states), results)
    else:
        run = differentiable(layer, inner_states, backend)
    return run.h, *run.last, *(run.saved if inner_states else [run.h.new_empty(0) for _ in run.saved])


for _cell in (*CELLS, lstm_projected):
    define(_cell)
when_declared.append(define)  # an export that is loaded has to find the operators of the cells that are declared
