"""Runs a Function under one level of torch.func's `vmap`, `grad` or `vjp`, with flat arguments: like torch's
``custom_function_call`` it unwraps them for this level, runs the level below, and wraps the results.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm import torch_private as private
from fastlstm.torch_private import dispatch_mode_count


def takes() -> bool:
    """Return whether `apply` can handle the innermost active level. It handles neither forward mode nor tracers."""
    if not private.KNOWS_LEVELS or torch.compiler.is_compiling() or dispatch_mode_count():
        return False
    return private.innermost().key() in (private.Kind.Vmap, private.Kind.Grad)


def apply(function: Any, *args: Any) -> Any:
    """Return ``function.apply(*args)`` at the innermost level. On the level below, ``function.apply`` is called again.
    `function` has setup_context and vmap, or under levels of `vmap` alone apply and vmap.
    """
    innermost = private.innermost()
    args = (*(private.unwrap_if_left(a) if isinstance(a, Tensor) else a for a in args),)
    if innermost.key() == private.Kind.Vmap:
        return _batched(private.VmapLevel(innermost), function, args)
    level = private.GradLevel(innermost)
    args = (*(level.lift(a) if isinstance(a, Tensor) else a for a in args),)
    was_allowed = private.single_level_is_allowed()
    private.allow_single_level(True)
    try:
        return _node(function).apply(*args, function, level)
    finally:
        private.allow_single_level(was_allowed)


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


class _Level(private.Node or Function):  # type: ignore[misc]
    """A Function's node in the graph of one level of `grad`, not applied where torch lacks the name of its base."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        *operands, function, interpreter = args
        level = interpreter.level()
        below = (private.unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in operands)
        # torch runs a Function's forward without gradients; the level below gets back its own mode
        enabled = torch.is_grad_enabled()
        left = private.leave_level()
        try:
            torch.set_grad_enabled(interpreter.prevGradMode())
            outputs = function.apply(*below)
        finally:
            private.enter_level_again(left)
            torch.set_grad_enabled(enabled)
        outputs = (*(private.wrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in outputs),)
        function.setup_context(ctx, (*operands,), outputs)
        ctx.function = function
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return *ctx.function.backward(ctx, *grads), None, None


@cache
def _node(function: Any) -> Any:
    """Return a `_Level` with the name of `function`, since graphs and errors name a node by its class."""
    return type(function.__name__, (_Level,), {})
