"""The operators' own rules of differentiation and of `vmap`, and the operator that a trace records.

A loaded export holds operators and no Functions. With these rules it can be trained and takes `vmap`, as a module does.
"""

from typing import Any

import torch
from torch import Tensor

from fastlstm.autograd import operators
from fastlstm.autograd.batching import backward_rule, forward_rule
from fastlstm.autograd.functions import LSTMBackward, LSTMFunction, differentiable
from fastlstm.backends.base import OPERANDS, Layer
from fastlstm.cells.library import lstm

Optional = Tensor | None


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *layer, ctx.saved, backend = inputs
    LSTMFunction.setup_context(ctx, (*layer, backend), output)


def _backward_of_forward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
    if not ctx.saved:
        raise RuntimeError(
            "fastlstm::forward was recorded with save=False: to train an export, record it with gradients"
        )
    return *LSTMFunction.backward(ctx, *grads), None


def _backward_of_backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
    wanted = (g if need else None for g, need in zip(grads, ctx.needs))
    return LSTMBackward.backward(ctx, *wanted)


def _vmap_forward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return forward_rule(operators.forward, operators.forward, info.batch_size, in_dims, *args)


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    outputs, dims = backward_rule(operators.backward, operators.backward, info.batch_size, in_dims, *args)
    return tuple(args[4].new_empty(0) if a is None else a for a in outputs), dims


for _name, _setup, _gradient, _rule in (
    ("forward", _setup_forward, _backward_of_forward, _vmap_forward),
    ("backward", LSTMBackward.setup_context, _backward_of_backward, _vmap_backward),
):
    operators.differentiate(_name, _gradient, _setup)
    torch.library.register_vmap(f"fastlstm::{_name}", _rule, lib=operators.LIBRARIES[_name])


def _layer(*args: Any) -> tuple[Tensor, ...]:
    *tensors, reverse, cells, backend = args
    h, h_n, c_n, c = differentiable(Layer.of(lstm, tensors, reverse), cells, backend)
    return h, h_n, c_n, c if cells else h.new_empty(0)


# The operator that `torch.jit.trace` records. It decomposes at each call, so one trace serves training and inference.
layer_op = operators.define(
    "layer",
    f"({OPERANDS}, bool reverse, bool cells, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer,
    "CompositeImplicitAutograd",
)
