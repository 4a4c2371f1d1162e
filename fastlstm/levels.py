"""Functions under functorch's levels: `vmap`, `grad`, `vjp`, and whatever is made of them.

Torch's own way flattens and rebuilds the arguments as trees some forty times a step and makes a class anew at each
level: a millisecond of an ensemble's training step. Arguments and outputs here are flat. The steps are those of
``torch._functorch.autograd_function.custom_function_call``: unwrap for this level, run the level below, wrap.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _add_batch_dim,
    _unwrap_batched,
    _unwrap_for_grad,
    _wrap_for_grad,
    unwrap_if_dead,
)
from torch._functorch.autograd_function import VmapInfo
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction


def takes() -> bool:
    """Whether `apply` knows the innermost of the levels that are active: no forward mode, and nobody traces."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._functorch.peek_interpreter_stack().key() in (TransformType.Vmap, TransformType.Grad)


def apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)`` at the innermost level; the level below calls that again.

    `function`: a `torch.autograd.Function` with setup_context and vmap; what has no derivative needs apply and vmap
    alone, and no level to be one of `grad`.
    """
    interpreter = retrieve_current_functorch_interpreter()
    args = (*(unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args),)
    if interpreter.key() == TransformType.Vmap:
        return _batched(interpreter, function, args)
    args = (*(interpreter._cptr.lift(a) if isinstance(a, Tensor) else a for a in args),)
    with enable_single_level_autograd_function():
        return _node(function).apply(*args, function, interpreter)


def _batched(interpreter: Any, function: Any, args: tuple[Any, ...]) -> Any:
    level, operands, dims = interpreter.level(), [], []
    for a in args:
        value, dim = _unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None)
        operands.append(value)
        dims.append(dim)
    with interpreter.lower():
        if all(dim is None for dim in dims):
            return function.apply(*args)
        info = VmapInfo(interpreter.batch_size(), interpreter.randomness())
        outputs, out_dims = function.vmap(info, (*dims,), *operands)
    return (*(a if dim is None else _add_batch_dim(a, dim, level) for a, dim in zip(outputs, out_dims)),)


class _Level(_SingleLevelFunction):
    """A Function's node in the graph of one level of `grad`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Any, ...]:
        *operands, function, interpreter = args
        level = interpreter.level()
        below = (_unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in operands)
        with torch.enable_grad(), _set_fwd_grad_enabled(True), interpreter.lower():
            outputs = function.apply(*below)
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
