"""functorch's levels: which there are, and Functions under `vmap`, `grad`, `vjp`, and whatever is made of them.

Torch's own way flattens and rebuilds the arguments as trees some forty times a step and makes a class anew at each
level: a millisecond of an ensemble's training step. Arguments and outputs here are flat. The steps are those of
``torch._functorch.autograd_function.custom_function_call``: unwrap for this level, run the level below, wrap.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    CGradInterpreterPtr,
    CVmapInterpreterPtr,
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    _unwrap_for_grad,
    _wrap_for_grad,
    get_single_level_autograd_function_allowed,
    peek_interpreter_stack,
    pop_dynamic_layer_stack,
    push_dynamic_layer_stack,
    set_single_level_autograd_function_allowed,
    unwrap_if_dead,
)
from torch._functorch.autograd_function import VmapInfo
from torch.autograd.function import _SingleLevelFunction


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)


def wants_autograd(*tensors: Tensor | None) -> bool:
    """True where the call must leave a trace for a derivative of any kind, or runs under a transform."""
    if wants_gradient(*tensors):
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    # a batched tensor does not tell whether what it holds requires a gradient
    only_vmap = not torch.is_grad_enabled() and levels_of(TransformType.Vmap) == len(_stack())
    return torch._C._are_functorch_transforms_active() and not only_vmap


def _stack() -> list[Any]:
    return torch._C._functorch.get_interpreter_stack() or []


def levels_of(kind: TransformType) -> int:
    """How many transforms of this kind are active, one inside the other."""
    return sum(level.key() == kind for level in _stack())


def takes() -> bool:
    """Whether `apply` knows the innermost of the levels that are active: no forward mode, and nobody traces."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return peek_interpreter_stack().key() in (TransformType.Vmap, TransformType.Grad)


def apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)`` at the innermost level; the level below calls that again.

    `function`: a `torch.autograd.Function` with setup_context and vmap; what has no derivative needs apply and vmap
    alone, and no level to be one of `grad`.
    """
    interpreter = peek_interpreter_stack()
    args = (*(unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args),)
    if interpreter.key() == TransformType.Vmap:
        return _batched(CVmapInterpreterPtr(interpreter), function, args)
    level = CGradInterpreterPtr(interpreter)
    args = (*(level.lift(a) if isinstance(a, Tensor) else a for a in args),)
    allowed = get_single_level_autograd_function_allowed()
    set_single_level_autograd_function_allowed(True)
    try:
        return _node(function).apply(*args, function, level)
    finally:
        set_single_level_autograd_function_allowed(allowed)


def _batched(interpreter: Any, function: Any, args: tuple[Any, ...]) -> Any:
    level, operands, dims = interpreter.level(), [], []
    for a in args:
        value, dim = _unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None)
        operands.append(value)
        dims.append(dim)
    popped = pop_dynamic_layer_stack()
    try:
        if all(dim is None for dim in dims):
            return function.apply(*args)
        info = VmapInfo(interpreter.batchSize(), "error")  # nothing here is random
        outputs, out_dims = function.vmap(info, (*dims,), *operands)
    finally:
        push_dynamic_layer_stack(popped)
    return (*(a if dim is None else _add_batch_dim(a, dim, level) for a, dim in zip(outputs, out_dims)),)


class _Level(_SingleLevelFunction):
    """A Function's node in the graph of one level of `grad`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        *operands, function, interpreter = args
        level = interpreter.level()
        below = (_unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in operands)
        # a Function's forward runs without gradients and tangents, the level below as it was entered
        enabled, tangents = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        popped = pop_dynamic_layer_stack()
        try:
            torch._C._set_grad_enabled(interpreter.prevGradMode())
            torch._C._set_fwd_grad_enabled(True)
            outputs = function.apply(*below)
        finally:
            push_dynamic_layer_stack(popped)
            torch._C._set_fwd_grad_enabled(tangents)
            torch._C._set_grad_enabled(enabled)
        outputs = (*(_wrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in outputs),)
        function.setup_context(ctx, (*operands,), outputs)
        ctx.function = function
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *ctx.function.backward(ctx, *grads), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # of dual numbers, which are no level
        return ctx.function.jvp(ctx, *tangents)


@cache
def _node(function: Any) -> Any:
    """Graphs and errors name a node by its class."""
    return type(function.__name__, (_Level,), {})
