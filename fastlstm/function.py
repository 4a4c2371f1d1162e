"""The autograd Functions: what is saved, which gradients, and every transform of them.

`LSTMFunction` runs a layer in one direction, `LSTMBackward` its gradients. Both define setup_context, jvp and vmap;
derivatives beyond the fused ones are `fastlstm.linearized`'s maths, with the fused backward where it is linear.
Where nothing is transformed `fastlstm.eager` has shorter ones. Equivalent to the derivatives of `torch.nn.LSTM`.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm import levels, ops
from fastlstm.batching import backward_rule, forward_rule
from fastlstm.levels import wants_autograd
from fastlstm.linearized import Linearized, WeightTangents
from fastlstm.ops import sum_of_biases
from fastlstm.torch_private import dual_level, plain_apply, transformed, when_compiling

Optional = Tensor | None


class _Function(Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        if transformed():
            return levels.apply(cls, *args) if levels.takes() else super().apply(*args)
        return plain_apply(cls)(*args)


def _leave_frame() -> None:
    """A graph may break around a call, or its backward pass run within: dynamo fails at the `super`s."""
    apply = vars(_Function)["apply"].__func__
    _Function.apply = classmethod(torch.compiler.disable(apply))  # type: ignore[assignment]


when_compiling(_leave_frame)


class LSTMBackward(_Function):
    """Gradients of one layer. Differentiable in all tensors but mask and gates, a buffer that is computed again from
    x and h. As h and c are arguments here, a second derivative is a loop each way and then LSTMFunction's backward.
    """

    @staticmethod
    def forward(
        dh: Optional,
        dh_n: Optional,
        dc_n: Optional,
        dc: Optional,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Optional,
        bias_hh: Optional,
        h_0: Optional,
        c_0: Optional,
        mask: Optional,
        h: Tensor,
        c: Tensor,
        gates: Tensor,
        reverse: bool,
        needs: list[bool],
        backend: str,
    ) -> tuple[Optional, ...]:
        tensors = (dh, dh_n, dc_n, dc, x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask, h, c, gates)
        return ops.backward(*tensors, reverse, needs, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.reverse, ctx.needs, ctx.backend = inputs[15:]
        ctx.save_for_backward(*inputs[:15])
        ctx.save_for_forward(*inputs[:15])

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        dh, dh_n, dc_n, dc, x, *_ = inputs = ctx.saved_tensors
        v_x, v_ih, v_hh, v_bias, v_h_0, v_c_0 = grads
        with no_autocast(x):
            layer, along = Linearized(*inputs[4:14], reverse=ctx.reverse), WeightTangents(v_ih, v_hh, v_bias)
            dpreact, dh_all, dc_all = layer.gradient(dh, dh_n, dc_n, dc)
            preact, h, c = layer.tangent(layer.preact_tangent(v_x, along, None), v_h_0, v_c_0)
            h_prev, c_prev = layer.before(h, v_h_0), layer.before(c, v_c_0)
            change, d_c_prev = layer.curvature(dh_all, dc_all, preact, c_prev)
            to_x, to_ih, to_hh, to_bias_ih, to_bias_hh = ctx.needs_input_grad[4:9]
            wanted = [to_x, to_ih, to_hh, to_bias_ih or to_bias_hh]
            *products, d_bias, d_h_prev = layer.products(change, dpreact, v_x, along, h_prev, wanted)
            (d_h, d_h_0), (d_c, d_c_0) = layer.after(d_h_prev), layer.after(d_c_prev)
        last = layer.order[-1]
        incoming = [None if a is None else g for a, g in zip((dh, dh_n, dc_n, dc), (h, h[last], c[last], c))]
        # what h and c get goes on through LSTMFunction's own backward
        d_biases = for_biases(d_bias, to_bias_ih, to_bias_hh)
        d_states = (None, None) if inputs[9] is None else (d_h_0, d_c_0)
        return *incoming, *products, *d_biases, *d_states, None, d_h, d_c, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        dh, dh_n, dc_n, dc, *inputs, gates = ctx.saved_tensors
        dh_t, dh_n_t, dc_n_t, dc_t, x_t, ih_t, hh_t, b_ih_t, b_hh_t, h_0_t, c_0_t, _, h_t, c_t, *_ = tangents
        layer, along = (
            Linearized(*inputs, reverse=ctx.reverse),
            WeightTangents(ih_t, hh_t, sum_of_biases(b_ih_t, b_hh_t)),
        )
        h, c = inputs[-2:]
        h_t, c_t = (torch.zeros_like(a) if t is None else t for a, t in ((h, h_t), (c, c_t)))
        dpreact, dh_all, dc_all = layer.gradient(dh, dh_n, dc_n, dc)
        h_prev, c_prev = layer.before(h_t, h_0_t), layer.before(c_t, c_0_t)
        preact = layer.preact_tangent(x_t, along, h_prev)
        change, d_c_prev = layer.curvature(dh_all, dc_all, preact, c_prev)
        *products, d_h_prev = layer.products(change, dpreact, x_t, along, h_prev, ctx.needs)
        (d_h, d_h_0), (d_c, d_c_0) = layer.after(d_h_prev), layer.after(d_c_prev)
        d_h, d_c = d_h if dh_t is None else d_h + dh_t, d_c if dc_t is None else d_c + dc_t
        # linear in the incoming gradients: the fused backward takes what the steps change by as more of them
        call = LSTMBackward.apply(d_h, dh_n_t, dc_n_t, d_c, *inputs, gates, ctx.reverse, ctx.needs, ctx.backend)
        return (*(a if a is None or b is None else a + b for a, b in zip(call, (*products, d_h_0, d_c_0))),)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return backward_rule(LSTMBackward.apply, ops.backward, info.batch_size, in_dims, *args)


class LSTMFunction(_Function):
    """One layer in one direction: ``h`` (T,B,H), ``h_n``, ``c_n`` (B,H), ``c`` (T,B,H) and the gates,
    which are a buffer.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Optional,
        bias_hh: Optional,
        h_0: Optional,
        c_0: Optional,
        mask: Optional,
        reverse: bool,
        backend: str,
        packed: Any = None,
    ) -> tuple[Tensor, ...]:
        if packed is not None:
            hx = None if h_0 is None or c_0 is None else (h_0, c_0)
            if (result := packed.forward(x, hx, reverse, save=True)) is not None:
                return result
        return ops.forward(x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask, reverse, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, _, _, c, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.reverse, ctx.backend, *packed = inputs[8:]
        # a reference that does not keep the copies of an older update's weights
        ctx.packed = weakref.ref(packed[0]) if packed and packed[0] is not None else lambda: None
        ctx.save_for_backward(*inputs[:8], h, c, gates)
        ctx.save_for_forward(*inputs[:8], h, c)

    @staticmethod
    def backward(ctx: Any, dh: Optional, dh_n: Optional, dc_n: Optional, dc: Optional, _: Any) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        to_x, to_ih, to_hh, to_bias_ih, to_bias_hh, to_h_0, to_c_0, *_ = ctx.needs_input_grad
        needs = [to_x, to_ih, to_hh, to_bias_ih or to_bias_hh, to_h_0, to_c_0]
        call: Callable[..., Any] = LSTMBackward.apply
        ready: tuple[Any, ...] = ()
        if not (differentiated() or transformed()):
            call, packed = ops.backward, ctx.packed()
            if packed is not None and not packed.stale and packed.is_as_saved(*inputs[1:3]):
                ready = (packed,)
        with no_autocast(inputs[0]):  # backward may run inside the caller's autocast
            gradients = call(dh, dh_n, dc_n, dc, *inputs, ctx.reverse, needs, ctx.backend, *ready)
        dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0 = gradients
        dbias_ih, dbias_hh = for_biases(dbias, to_bias_ih, to_bias_hh)
        return dx, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dh_0, dc_0, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        x_t, ih_t, hh_t, b_ih_t, b_hh_t, h_0_t, c_0_t, *_ = tangents
        layer = Linearized(*ctx.saved_tensors, reverse=ctx.reverse)
        along = WeightTangents(ih_t, hh_t, sum_of_biases(b_ih_t, b_hh_t))
        _, h, c = layer.tangent(layer.preact_tangent(x_t, along, None), h_0_t, c_0_t)
        last = layer.order[-1]
        return h, h[last].clone(), c[last].clone(), c, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return forward_rule(LSTMFunction.apply, _saving, info.batch_size, in_dims, *args)


def _saving(*args: Any) -> tuple[Tensor, ...]:
    *layer, reverse, backend = args[:10]
    return ops.forward(*layer, reverse, True, backend)  # type: ignore[call-arg]


class WithoutGradients:
    """`ops.forward` under any levels of `vmap`."""

    @staticmethod
    def apply(*args: Any) -> tuple[Tensor, ...]:
        if transformed() and levels.takes():
            return levels.apply(WithoutGradients, *args)
        return ops.forward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return forward_rule(WithoutGradients.apply, ops.forward, info.batch_size, in_dims, *args)


def take_rows(a: Tensor, order: Tensor, axis: int) -> Tensor:
    """The rows of `a` along an axis in `order`, a permutation. Equivalent to ``a.index_select(axis, order)``, but the
    gradient is taken likewise, where that one's is added up row by row.
    """
    if not ops.is_untransformed(a, order):
        return a.index_select(axis, order)
    return _TakeRows.apply(a, order, axis)


def narrowed(results: tuple[Tensor, ...], dtype: torch.dtype, given: tuple[Optional, ...]) -> tuple[Tensor, ...]:
    """Results of a layer in a type of 16 bits, of which it was `given` tensors and computed with copies in float32.

    Equivalent to `Tensor.to` for each; but a given tensor that is changed in place before the backward pass is an error
    there, as it is where autograd saves it itself.
    """
    if ops.is_untransformed(*results, *given):
        return _Narrowed.apply(dtype, len(results), *results, *given)
    return (*(a.to(dtype) for a in results),)


class _Narrowed(Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, count: int, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        return (*(a.to(dtype) for a in tensors[:count]),)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        given = ctx.saved_tensors  # raises for one that was changed
        return None, None, *(None if g is None else g.float() for g in grads), *(None for _ in given)


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


def for_biases(dbias: Optional, to_ih: bool, to_hh: bool) -> tuple[Optional, Optional]:
    """The gradient of their sum to each bias that wants it: a tensor of its own, since what is done to one in place is
    not to be done to the other's.
    """
    first, second = dbias if to_ih else None, dbias if to_hh else None
    return first, second.clone() if second is not None and to_ih else second


def differentiated() -> bool:
    """Whether what a backward pass computes is differentiated itself, in either mode."""
    return torch.is_grad_enabled() or dual_level()


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    device = "cpu" if tensor.device.type == "meta" else tensor.device.type
    if not torch.is_autocast_enabled(device):  # a context costs 10 microseconds
        return nullcontext()
    return torch.autocast(device, enabled=False)


# The operators' own rules: a loaded export, whose graph holds operators and no Functions, trains and takes vmap too.


def _setup_forward_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    LSTMFunction.setup_context(ctx, (*inputs[:9], inputs[10]), output)
    ctx.saved = inputs[9]


def _backward_of_forward_op(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
    if not ctx.saved:
        raise RuntimeError(
            "fastlstm::forward was recorded with save=False: to train an export, record it with gradients"
        )
    return LSTMFunction.backward(ctx, *grads)


def _backward_of_backward_op(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
    wanted = (g if need else None for g, need in zip(grads, ctx.needs))
    return LSTMBackward.backward(ctx, *wanted)


def _vmap_forward_op(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    return forward_rule(ops.forward, ops.forward, info.batch_size, in_dims, *args)


def _vmap_backward_op(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    outputs, dims = backward_rule(ops.backward, ops.backward, info.batch_size, in_dims, *args)
    return tuple(args[4].new_empty(0) if a is None else a for a in outputs), dims


for _name, _setup, _gradient, _rule in (
    ("forward", _setup_forward_op, _backward_of_forward_op, _vmap_forward_op),
    ("backward", LSTMBackward.setup_context, _backward_of_backward_op, _vmap_backward_op),
):
    ops.differentiate(_name, _gradient, _setup)
    torch.library.register_vmap(f"fastlstm::{_name}", _rule, lib=ops.LIBRARIES[_name])


def _layer(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional,
    bias_hh: Optional,
    h_0: Optional,
    c_0: Optional,
    mask: Optional,
    reverse: bool,
    cells: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask
    if wants_autograd(*call):
        h, h_n, c_n, c, _ = LSTMFunction.apply(*call, reverse, backend)
    else:
        h, h_n, c_n, c, _ = WithoutGradients.apply(*call, reverse, cells, backend)
    return h, h_n, c_n, c if cells else x.new_empty(0)


# What `torch.jit.trace` records. It is taken apart at each call, and so may be trained, or run without what training
# saves, whatever it was traced with.
layer_op = ops.define("layer", _layer, "CompositeImplicitAutograd")
