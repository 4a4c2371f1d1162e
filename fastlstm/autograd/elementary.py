"""Two small Functions around a layer: one permutes rows, and one rounds results to 16 bits."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm.autograd.modes import is_untransformed, wants_gradient

Optional = Tensor | None


def take_rows(a: Tensor, order: Tensor, axis: int) -> Tensor:
    """Return ``a.index_select(axis, order)``, whose backward pass also selects, as `order` is a permutation."""
    if not is_untransformed(a, order):
        return a.index_select(axis, order)
    return cast(Tensor, _TakeRows.apply(a, order, axis))


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, order: Tensor, axis: int) -> Tensor:
        ctx.axis = axis
        ctx.save_for_backward(order)
        return a.index_select(axis, order)

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return take_rows(da, order.argsort(), ctx.axis), None, None


def narrowed(results: tuple[Any, ...], dtype: torch.dtype, operands: tuple[Optional, ...]) -> tuple[Any, ...]:
    """Return float32 results of a layer in `dtype`, the 16-bit type of its `operands`. Beyond `Tensor.to`, the backward
    pass raises if an operand was changed in place: autograd saved only float32 copies, and would not notice.
    """
    if wants_gradient(*results) and is_untransformed(*results, *operands):
        return cast(tuple[Any, ...], _Narrowed.apply(dtype, len(results), *results, *operands))
    return (*(None if a is None else a.to(dtype) for a in results),)


class _Narrowed(Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, count: int, *tensors: Any) -> tuple[Optional, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        return (*(None if a is None else a.to(dtype) for a in tensors[:count]),)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        operands = ctx.saved_tensors  # raises if one was changed
        return None, None, *(None if g is None else g.float() for g in grads), *(None for _ in operands)
