"""functorch's levels: which there are, and Functions under `vmap`, `grad`, `vjp`, and whatever is made of them.

Torch's own way flattens and rebuilds the arguments as trees some forty times a step and makes a class anew at each
level: a millisecond of an ensemble's training step. Arguments and outputs here are flat. The steps are those of its
``custom_function_call``: unwrap for this level, run the level below, wrap.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm import torch_private as private
from fastlstm.torch_private import dual_level, plain_apply, transformed, watched


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)


def wants_autograd(*tensors: Tensor | None) -> bool:
    """True where the call must leave a trace for a derivative of any kind, or runs under a transform."""
    if wants_gradient(*tensors) or dual_level():
        return True
    if not transformed():
        return False
    # a batched tensor does not tell whether what it holds requires a gradient
    return torch.is_grad_enabled() or not private.KNOWS_LEVELS or any(kind != private.Kind.Vmap for kind in _kinds())


def _kinds() -> list[Any]:
    """Of the transforms that are active, one inside the other."""
    return [level.key() for level in private.all_levels() or ()]


def under_vmap() -> bool:
    """Also under any other transform, where torch does not tell which it is."""
    return transformed() and (not private.KNOWS_LEVELS or private.Kind.Vmap in _kinds())


def nests_forward_mode() -> bool:
    """Over more than one forward-mode level, any Function's derivative is silently zero. Also true over one, where
    torch does not tell how many there are.
    """
    if not (transformed() and dual_level()):
        return False
    return not private.KNOWS_LEVELS or _kinds().count(private.Kind.Jvp) > 1


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


class _Info(NamedTuple):
    """What a rule of `vmap` is told: of torch's, what the rules here read."""

    batch_size: int


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
        outputs, out_dims = function.vmap(_Info(interpreter.batchSize()), (*dims,), *operands)
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
