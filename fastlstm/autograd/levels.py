"""A Function under one level of torch.func's `vmap`, `grad` or `vjp`, with flat arguments.

torch's own way flattens and rebuilds the arguments as trees some forty times a step, which takes 0.9 ms of an
ensemble's training step. The steps here are those of its ``custom_function_call``: unwrap the arguments for this level,
run the level below, and wrap the results.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm import torch_private as private
from fastlstm.torch_private import plain_apply, watched


def takes() -> bool:
    """Whether `apply` knows the innermost of the levels that are active: no forward mode, and nobody traces."""
    if not private.KNOWS_LEVELS or torch.compiler.is_compiling() or watched():
        return False
    return private.innermost().key() in (private.Kind.Vmap, private.Kind.Grad)


def apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)`` at the innermost level; the level below calls that again.

    `function`: a `torch.autograd.Function` with setup_context and vmap; what has no derivative needs apply and vmap
    alone, and no level to be one of `grad`.
    """
    innermost = private.innermost()
    args = (*(private.unwrap_if_left(a) if isinstance(a, Tensor) else a for a in args),)
    if innermost.key() == private.Kind.Vmap:
        return _batched(private.VmapLevel(innermost), function, args)
    level = private.GradLevel(innermost)
    args = (*(level.lift(a) if isinstance(a, Tensor) else a for a in args),)
    let = private.lets_nodes()
    private.let_nodes(True)
    try:
        return plain_apply(_node(function))(*args, function, level)
    finally:
        private.let_nodes(let)


def _batched(interpreter: Any, function: Any, args: tuple[Any, ...]) -> Any:
    level, operands, dims = interpreter.level(), [], []
    for a in args:
        value, dim = private.unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None)
        operands.append(value)
        dims.append(dim)
    left = private.leave_level()
    try:
        if all(dim is None for dim in dims):
            return function.apply(*args)
        outputs, out_dims = function.vmap(SimpleNamespace(batch_size=interpreter.batchSize()), (*dims,), *operands)
    finally:
        private.enter_level_again(left)
    return (*(a if dim is None else private.wrap_batched(a, dim, level) for a, dim in zip(outputs, out_dims)),)


class _Level(Function):
    """A Function's node in the graph of one level of `grad`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        *operands, function, interpreter = args
        level = interpreter.level()
        below = (private.unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in operands)
        # a Function's forward runs without gradients and tangents, the level below as it was entered
        enabled = torch.is_grad_enabled()
        left = private.leave_level()
        try:
            torch.set_grad_enabled(interpreter.prevGradMode())
            private.enable_tangents(True)
            outputs = function.apply(*below)
        finally:
            private.enter_level_again(left)
            private.enable_tangents(False)
            torch.set_grad_enabled(enabled)
        outputs = (*(private.wrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in outputs),)
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
