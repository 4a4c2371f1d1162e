"""Rules of `vmap` for a layer and its gradients: batched inputs are more rows, batched weights a stack of layers."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastlstm.levels import wants_autograd
from fastlstm.torch_private import transformed

Optional = Tensor | None


def _fold(a: Optional, dim: int | None, size: int, axis: int) -> Optional:
    """vmap's axis goes in front of the batch rows at `axis`."""
    if a is None:
        return None
    if dim is None:
        a = a.unsqueeze(axis).expand(*a.shape[:axis], size, *a.shape[axis:])
    elif dim != axis:
        a = a.movedim(dim, axis)
    return a.flatten(axis, axis + 1)


def _stack(a: Optional, dim: int | None, size: int, rank: int) -> Optional:
    """vmap's axis becomes the group axis of a weight (`rank` 2) or bias (1), or its slower part where there was one."""
    if a is None:
        return None
    a = a.unsqueeze(0).expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
    return a.flatten(0, 1) if a.dim() > rank + 1 else a


def _goes_on(*tensors: Optional) -> bool:
    """Whether there is a level below, or a derivative is wanted there."""
    return transformed() or wants_autograd(*tensors)


def _fold_x(x: Any, dim: int | None, size: int, groups: int) -> Any:
    """`_fold` of ``x`` for `groups` layers. What all read becomes (T,G,B,I), which is no copy, where no derivative
    of it is wanted below.
    """
    if dim is None and size == groups and x.dim() == 3 and not _goes_on(x):
        return x.unsqueeze(1).expand(-1, size, -1, -1)
    return _fold(x, dim, size, 1)


def forward_rule(
    call: Callable[..., Any], last: Callable[..., Any], size: int, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """`last`: what `call` comes to where it does not go on."""
    weights: Sequence[Any] = args[1:5]
    if any(d is not None for d in in_dims[1:5]) or weights[0].dim() == 3:
        weights = [_stack(a, d, size, rank) for a, d, rank in zip(weights, in_dims[1:5], (2, 2, 1, 1))]
    states = [_fold(args[k], in_dims[k], size, axis) for k, axis in zip((5, 6, 7), (0, 0, 1))]
    x = _fold_x(args[0], in_dims[0], size, weights[0].shape[0] if weights[0].dim() == 3 else 1)
    outputs = (call if _goes_on(*args[:8]) else last)(x, *weights, *states, *args[8:])
    of_gates = 0 if weights[0].dim() == 3 and outputs[4].dim() == 5 else outputs[4].dim() - 2
    axes = [None if a.dim() == 1 else axis for a, axis in zip(outputs, (1, 0, 0, 1, of_gates))]
    return tuple(a if axis is None else a.unflatten(axis, (size, -1)) for a, axis in zip(outputs, axes)), tuple(axes)


def backward_rule(
    call: Callable[..., Any], last: Callable[..., Any], size: int, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    incoming = [_fold(a, d, size, axis) for a, d, axis in zip(args, in_dims, (1, 0, 0, 1))]
    # one gradient a sample: one group a sample, even where the weights are shared
    weights: Any = [_stack(a, d, size, rank) for a, d, rank in zip(args[5:9], in_dims[5:9], (2, 2, 1, 1))]
    states = [_fold(a, d, size, axis) for a, d, axis in zip(args[9:14], in_dims[9:14], (0, 0, 1, 1, 1))]
    of_gates = args[14].dim() - (in_dims[14] is not None)
    gates = _fold(args[14], in_dims[14], size, 0 if of_gates == 5 else of_gates - 2)
    x = _fold_x(args[4], in_dims[4], size, weights[0].shape[0])
    call = call if _goes_on(*args[:15]) else last
    dx, *of_weights, dh_0, dc_0 = call(*incoming, x, *weights, *states, gates, *args[15:])
    bias = 7 if args[8] is None else 8
    for k, (of, rank) in enumerate(((5, 2), (6, 2), (bias, 1))):
        a, d = args[of], in_dims[of]
        if of_weights[k] is not None and a.dim() - (d is not None) > rank:  # the stack held groups of its own
            of_weights[k] = of_weights[k].unflatten(0, (size, -1))
    dx, dh_0, dc_0 = (a if a is None else a.unflatten(axis, (size, -1)) for a, axis in zip((dx, dh_0, dc_0), (1, 0, 0)))
    out = (dx, *of_weights, dh_0, dc_0)
    return out, tuple(None if a is None else axis for a, axis in zip(out, (1, 0, 0, 0, 0, 0)))
