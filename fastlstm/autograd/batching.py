"""Rules of `vmap` for a layer and its gradients: batched inputs become more rows, batched weights a stack of layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastlstm.autograd.modes import wants_autograd
from fastlstm.backends import dispatch
from fastlstm.backends.base import Gradients, Layer, count_tensors, ranks, stack_size_of
from fastlstm.cells.spec import Cell
from fastlstm.torch_private import transformed

Optional = Tensor | None


def _fold(a: Optional, dim: int | None, size: int, axis: int) -> Optional:
    """Return `a` with vmap's axis merged into its batch rows, which lie along `axis`."""
    if a is None:
        return None
    if dim is None:
        a = a.unsqueeze(axis).expand(*a.shape[:axis], size, *a.shape[axis:])
    elif dim != axis:
        a = a.movedim(dim, axis)
    return a.flatten(axis, axis + 1)


def _stack(a: Optional, dim: int | None, size: int, rank: int) -> Optional:
    """Return a weight (`rank` 2) or bias (1) with vmap's axis as that of a stack, in front of one that it has."""
    if a is None:
        return None
    a = a.unsqueeze(0).expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
    return a.flatten(0, 1) if a.dim() > rank + 1 else a


def _continues(*tensors: Optional) -> bool:
    """Return whether another level is below this one, or a derivative is wanted there."""
    return transformed() or wants_autograd(*tensors)


def _rows_of_saved(backend: str, rank: int) -> int:
    """Return the axis of a backend's saved values along which stacked layers or batch rows lie."""
    return 0 if rank == dispatch.traits(backend).stack_rank else rank - 2


def _fold_x(x: Any, dim: int | None, size: int, stack: int) -> Any:
    """Return `_fold` of ``x``, or a view (T,G,B,I) if all layers read one x, without a derivative wanted below."""
    if dim is None and size == stack and x.dim() == 3 and not _continues(x):
        return x.unsqueeze(1).expand(-1, size, -1, -1)
    return _fold(x, dim, size, 1)


def _fold_layer(size: int, dims: Any, layer: Layer, stacks: bool) -> Layer:
    """Return a layer with vmap's axis merged into the batch rows, and into the weights if `stacks`."""
    weights = layer.weights
    if stacks:
        weights = tuple(_stack(a, d, size, rank) for a, d, rank in zip(weights, dims.weights, ranks(layer.cell)))
    states, inputs = (
        tuple(_fold(a, d, size, axis) for a, d in zip(of, of_dims))
        for axis, of, of_dims in ((0, layer.states, dims.states), (1, layer.inputs, dims.inputs))
    )
    lengths, reset = _fold(layer.lengths, dims.lengths, size, 0), _fold(layer.reset, dims.reset, size, 1)
    x = _fold_x(layer.x, dims.x, size, stack_size_of(layer._replace(weights=weights)))
    return Layer(x, weights, states, lengths, reset, layer.reverse, layer.cell, inputs)


def forward_rule(
    cell: Cell, call: Callable[..., Any], last: Callable[..., Any], size: int, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """Return the outputs of a layer, and the axis of each along which vmap's samples lie. `call` runs the layer, or
    `last`, the plain operator, when no outer level or derivative is left.
    """
    count, states = count_tensors(cell), len(cell.states)
    unfolded, dims = Layer.of(cell, args[:count], False), Layer.of(cell, in_dims[:count], False)
    stacks = any(d is not None for d in dims.weights) or stack_size_of(unfolded) > 0
    layer = _fold_layer(size, dims, unfolded, stacks)
    outputs = (call if _continues(*args[:count]) else last)(*layer.tensors, *args[count:])
    rank = outputs[-1].dim()
    of_saved = _rows_of_saved(args[-1], rank) if stack_size_of(layer) else rank - 2  # where an outer level has stacks
    axes = 1, *[0] * states, *[1] * (states - 1), of_saved
    axes = tuple(None if a.dim() == 1 else axis for a, axis in zip(outputs, axes))  # empty outputs have one axis
    return tuple(a if axis is None else a.unflatten(axis, (size, -1)) for a, axis in zip(outputs, axes)), axes


def backward_rule(
    cell: Cell, call: Callable[..., Any], last: Callable[..., Any], size: int, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """Do what `forward_rule` does, for the arguments of `LayerBackward`."""
    states = len(cell.states)
    first = 2 * states
    end = first + count_tensors(cell)
    of_states = 1, *[0] * states, *[1] * (states - 1)
    incoming = [_fold(a, d, size, axis) for a, d, axis in zip(args, in_dims, of_states)]
    # each sample has weight gradients of its own, so it is a layer of a stack, even where samples share the weights
    unfolded, dims = Layer.of(cell, args[first:end], False), Layer.of(cell, in_dims[first:end], False)
    layer, gates = _fold_layer(size, dims, unfolded, True), end + states
    axes = *[1] * states, _rows_of_saved(args[-1], args[gates].dim() - (in_dims[gates] is not None))
    saved = [_fold(a, d, size, axis) for a, d, axis in zip(args[end:], in_dims[end:], axes)]
    call = call if _continues(*args[: gates + 1]) else last
    gradients = Gradients.of(cell, call(*incoming, *layer.tensors, *saved, *args[gates + 1 :]))

    def of_rows(a: Optional, axis: int) -> Optional:
        return a if a is None else a.unflatten(axis, (size, -1))

    weights = tuple(
        of_rows(g, 0) if g is not None and a.dim() - (d is not None) > rank else g  # the weights were a stack already
        for g, a, d, rank in zip(gradients.weights, unfolded.weights, dims.weights, ranks(cell))
    )
    out = Gradients(
        of_rows(gradients.x, 1),
        weights,
        tuple(of_rows(a, 0) for a in gradients.states),
        tuple(of_rows(a, 1) for a in gradients.inputs),
    )
    axes = Gradients(1, (0,) * len(weights), (0,) * states, (1,) * len(cell.inputs)).flat
    return out.flat, tuple(None if a is None else axis for a, axis in zip(out.flat, axes))
