"""Rules of `vmap` for a layer and its gradients: batched inputs become more rows, batched weights a stack of layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastlstm.autograd.modes import wants_autograd
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
    """Return a weight (`rank` 2) or bias (1) with vmap's axis as group axis. It is merged in front of one it has."""
    if a is None:
        return None
    a = a.unsqueeze(0).expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
    return a.flatten(0, 1) if a.dim() > rank + 1 else a


def _goes_on(*tensors: Optional) -> bool:
    """Return whether another level is below this one, or a derivative is wanted there."""
    return transformed() or wants_autograd(*tensors)


def _fold_x(x: Any, dim: int | None, size: int, groups: int) -> Any:
    """Return `_fold` of ``x``. If every group reads the same x, return (T,G,B,I) as an expanded view instead; only if
    no derivative of x is wanted below.
    """
    if dim is None and size == groups and x.dim() == 3 and not _goes_on(x):
        return x.unsqueeze(1).expand(-1, size, -1, -1)
    return _fold(x, dim, size, 1)


def _fold_operands(size: int, dims: tuple[Any, ...], operands: tuple[Any, ...], stacks: bool) -> tuple[Any, ...]:
    """Return a layer's tensors with vmap's axis merged into the batch rows, and into the weights if `stacks`."""
    x, weights, others = operands[0], operands[1:5], operands[5:]
    if stacks:
        weights = tuple(_stack(a, d, size, rank) for a, d, rank in zip(weights, dims[1:5], (2, 2, 1, 1)))
    groups = weights[0].shape[0] if weights[0].dim() == 3 else 1
    # h_0, c_0, lengths and reset
    others = tuple(_fold(a, d, size, axis) for a, d, axis in zip(others, dims[5:], (0, 0, 0, 1)))
    return _fold_x(x, dims[0], size, groups), *weights, *others


def forward_rule(
    call: Callable[..., Any], last: Callable[..., Any], size: int, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """Return the outputs of a layer, and the axis of each along which vmap's samples lie. `call` runs the layer; `last`
    is the plain operator that runs it when no outer level or derivative is left.
    """
    given = args[:9]
    stacks = any(d is not None for d in in_dims[1:5]) or given[1].dim() == 3
    operands = _fold_operands(size, in_dims[:9], given, stacks)
    outputs = (call if _goes_on(*given) else last)(*operands, *args[9:])
    of_gates = 0 if operands[1].dim() == 3 and outputs[4].dim() == 5 else outputs[4].dim() - 2
    axes = [None if a.dim() == 1 else axis for a, axis in zip(outputs, (1, 0, 0, 1, of_gates))]
    return tuple(a if axis is None else a.unflatten(axis, (size, -1)) for a, axis in zip(outputs, axes)), tuple(axes)


def backward_rule(
    call: Callable[..., Any], last: Callable[..., Any], size: int, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """Do what `forward_rule` does, for the arguments of `LSTMBackward`."""
    incoming = [_fold(a, d, size, axis) for a, d, axis in zip(args, in_dims, (1, 0, 0, 1))]
    # each sample gets weight gradients of its own, so it is a group, even where all samples share the weights
    operands = _fold_operands(size, in_dims[4:13], args[4:13], True)
    of_gates = args[15].dim() - (in_dims[15] is not None)
    axes = 1, 1, 0 if of_gates == 5 else of_gates - 2
    kept = [_fold(a, d, size, axis) for a, d, axis in zip(args[13:16], in_dims[13:16], axes)]
    call = call if _goes_on(*args[:16]) else last
    dx, *of_weights, dh_0, dc_0 = call(*incoming, *operands, *kept, *args[16:])
    for k, rank in enumerate((2, 2, 1, 1)):
        a, d = args[5 + k], in_dims[5 + k]
        if of_weights[k] is not None and a.dim() - (d is not None) > rank:  # the weights had groups already
            of_weights[k] = of_weights[k].unflatten(0, (size, -1))
    dx, dh_0, dc_0 = (a if a is None else a.unflatten(axis, (size, -1)) for a, axis in zip((dx, dh_0, dc_0), (1, 0, 0)))
    out = (dx, *of_weights, dh_0, dc_0)
    return out, tuple(None if a is None else axis for a, axis in zip(out, (1, 0, 0, 0, 0, 0, 0)))
