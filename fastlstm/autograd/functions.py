"""The pair of autograd Functions: `LSTMFunction` runs a layer in one direction, and `LSTMBackward` its backward pass.

Both define ``vmap`` and ``jvp``, and both can be differentiated again. The fused backward pass computes first
derivatives. `fastlstm.autograd.linearized` computes the others, and leaves to the fused backward pass what is linear in
the incoming gradients. All are equivalent to the derivatives of `torch.nn.LSTM`.

The arguments are flat: first the tensors, in the order of `Layer.tensors`, and then the other arguments. Two small
Functions stand beside the pair: one permutes rows, and one rounds results to 16 bits.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm.autograd import levels, operators
from fastlstm.autograd.batching import backward_rule, forward_rule
from fastlstm.autograd.linearized import Linearized, WeightTangents
from fastlstm.autograd.modes import (
    differentiated,
    is_plain,
    is_untransformed,
    no_autocast,
    wants_autograd,
    wants_gradient,
)
from fastlstm.backends.base import Gradients, Layer, Run, bias_gradients, sum_of
from fastlstm.cells.library import lstm
from fastlstm.torch_private import plain_apply, transformed, when_compiling

Optional = Tensor | None
TENSORS, GRADIENTS = 9, 7  # how many tensors a layer has, and how many of them have gradients


class _Function(Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        if transformed():
            return levels.apply(cls, *args) if levels.takes() else super().apply(*args)
        return plain_apply(cls)(*args)


def _leave_frame() -> None:
    """Hide `apply` from dynamo, which fails at its `super`. It meets `apply` where a graph breaks around a call."""
    apply = vars(_Function)["apply"].__func__
    _Function.apply = classmethod(torch.compiler.disable(apply))  # type: ignore[assignment]


when_compiling(_leave_frame)


class LSTMBackward(_Function):
    """The gradients of one layer, in the order of its tensors.

    Args:
        args: dh, dh_n, dc_n and dc; the layer's tensors; h, c and gates of its run; reverse; seven booleans that say
            which gradients are wanted; and the backend's name.

    It is differentiable in all tensors but lengths, reset and gates, a buffer of the backend. A second derivative takes
    two loops over time: `Linearized.gradient` and `Linearized.tangent`. They treat h and c as given. The gradients of h
    and c then go through `LSTMFunction`'s own backward pass.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Optional, ...]:
        return operators.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.reverse, ctx.needs, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        dh, dh_n, dc_n, dc, *operands, h, c, _ = ctx.saved_tensors
        v_x, v_ih, v_hh, v_bias_ih, v_bias_hh, v_h_0, v_c_0 = grads
        layer = Layer.of(lstm, operands, ctx.reverse)
        wanted = Gradients.of(lstm, ctx.needs_input_grad[4 : 4 + GRADIENTS])
        with no_autocast(layer.x):
            along = WeightTangents(v_ih, v_hh, sum_of(v_bias_ih, v_bias_hh))
            around = Linearized(layer, h, c)
            dpreact, dh_all, dc_all = around.gradient(dh, dh_n, dc_n, dc)
            preact, h_t, c_t = around.tangent(around.preact_tangent(v_x, along, None), v_h_0, v_c_0)
            h_prev, c_prev = around.h_before(h_t, v_h_0), around.c_before(c_t, v_c_0)
            change, d_c_prev = around.curvature(dh_all, dc_all, preact, c_prev)
            dx, d_ih, d_hh, d_bias, d_h_prev = around.products(change, dpreact, v_x, along, h_prev, wanted)
            (d_h, d_h_0), (d_c, d_c_0) = around.h_after(d_h_prev), around.c_after(d_c_prev)
        last = around.order[-1]
        outputs = around.outputs(h_t), h_t[last], c_t[last], c_t
        incoming = [None if a is None else g for a, g in zip((dh, dh_n, dc_n, dc), outputs)]
        d_states = (None, None) if layer.states[0] is None else (d_h_0, d_c_0)
        gradients = dx, d_ih, d_hh, *bias_gradients(d_bias, wanted), *d_states
        # autograd passes d_h and d_c on to LSTMFunction's own backward
        return *incoming, *gradients, None, None, d_h, d_c, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        dh, dh_n, dc_n, dc, *operands, h, c, gates = ctx.saved_tensors
        dh_t, dh_n_t, dc_n_t, dc_t, x_t, ih_t, hh_t, b_ih_t, b_hh_t, h_0_t, c_0_t, _, _, h_t, c_t, *_ = tangents
        layer, needs = Layer.of(lstm, operands, ctx.reverse), Gradients.of(lstm, ctx.needs)
        around, along = Linearized(layer, h, c), WeightTangents(ih_t, hh_t, sum_of(b_ih_t, b_hh_t))
        h_t, c_t = (torch.zeros_like(a) if t is None else t for a, t in ((h, h_t), (c, c_t)))
        dpreact, dh_all, dc_all = around.gradient(dh, dh_n, dc_n, dc)
        h_prev, c_prev = around.h_before(h_t, h_0_t), around.c_before(c_t, c_0_t)
        preact = around.preact_tangent(x_t, along, h_prev)
        change, d_c_prev = around.curvature(dh_all, dc_all, preact, c_prev)
        dx, d_ih, d_hh, d_bias, d_h_prev = around.products(change, dpreact, x_t, along, h_prev, needs)
        (d_h, d_h_0), (d_c, d_c_0) = around.h_after(d_h_prev), around.c_after(d_c_prev)
        # the fused backward is linear in the incoming gradients, so d_h and d_c are added to their tangents
        incoming = sum_of(d_h, dh_t), dh_n_t, dc_n_t, sum_of(d_c, dc_t)
        linear = LSTMBackward.apply(*incoming, *operands, h, c, gates, ctx.reverse, ctx.needs, ctx.backend)
        others = dx, d_ih, d_hh, *bias_gradients(d_bias, needs), d_h_0, d_c_0
        return (*(a if a is None or b is None else a + b for a, b in zip(linear, others)),)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return backward_rule(LSTMBackward.apply, operators.backward, info.batch_size, in_dims, *args)


class LSTMFunction(_Function):
    """One layer in one direction: ``h`` (T, B, H), ``h_n`` and ``c_n`` (B, H), ``c`` (T, B, H) and gates, a buffer.

    Args:
        args: the layer's tensors, reverse, and a backend's name or a `Plan`. With a plan of a single step or of
            16 bits, all outputs after c_n are non-differentiable buffers.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Optional, ...]:
        plan_or_name = args[-1]
        if isinstance(plan_or_name, str):
            return operators.forward(*args[:-1], True, plan_or_name)
        h, last, kept = plan_or_name.forward(Layer.of(lstm, args[:TENSORS], args[TENSORS]))
        return h, *last, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.reverse, plan_or_name = inputs[TENSORS:]
        ctx.plan_or_name, planned = plan_or_name, not isinstance(plan_or_name, str)
        saved = *inputs[:TENSORS], output[0] if not planned or plan_or_name.reads_h else None, *output[3:]
        ctx.mark_non_differentiable(*output[3 if planned and not plan_or_name.keeps_cells else 4 :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        if not planned:  # plans have no forward mode
            ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dh: Optional, dh_n: Optional, dc_n: Optional, dc: Optional, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        operands, (h, *kept) = saved[:TENSORS], saved[TENSORS:]
        incoming, needs = (dh, dh_n, dc_n, dc), ctx.needs_input_grad[:GRADIENTS]
        if isinstance(ctx.plan_or_name, str):
            call: Callable[..., Any] = LSTMBackward.apply if differentiated() or transformed() else operators.backward
            with no_autocast(operands[0]):  # backward may run inside the caller's autocast
                gradients = call(*incoming, *operands, h, *kept, ctx.reverse, [*needs], ctx.plan_or_name)
        elif not differentiated() and is_plain(*incoming, h, *kept):
            run, layer = Run(h, (None, None), tuple(kept)), Layer.of(lstm, operands, ctx.reverse)
            grads = Run(dh, (dh_n, dc_n), (dc,))
            gradients = ctx.plan_or_name.backward(grads, layer, run, Gradients.of(lstm, needs)).flat
        else:
            gradients = _composed(ctx, incoming, operands, (h, *kept), needs)
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        x_t, ih_t, hh_t, b_ih_t, b_hh_t, h_0_t, c_0_t, *_ = tangents
        *operands, h, c, _ = ctx.saved_tensors
        layer = Linearized(Layer.of(lstm, operands, ctx.reverse), h, c)
        along = WeightTangents(ih_t, hh_t, sum_of(b_ih_t, b_hh_t))
        _, h, c = layer.tangent(layer.preact_tangent(x_t, along, None), h_0_t, c_0_t)
        last = layer.order[-1]
        return layer.outputs(h), h[last].clone(), c[last].clone(), c, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return forward_rule(LSTMFunction.apply, _saving, info.batch_size, in_dims, *args)


apply_plain = plain_apply(LSTMFunction)  # for calls under no transform


def _composed(
    ctx: Any, incoming: tuple[Optional, ...], operands: tuple[Any, ...], kept: tuple[Any, ...], needs: Any
) -> tuple[Optional, ...]:
    """Return the gradients of a planned run, from Functions that can be differentiated again."""
    x, given = operands[0], operands[5]
    leading = 0 if given is None else given.dim() - 2
    narrow = x.itemsize == 2

    def plain(a: Any, axes: int) -> Any:
        """Return `a` without its leading axis of one, if it has `axes`, and in float32 instead of 16 bits."""
        if a is None:
            return None
        a = a.squeeze(0) if axes else a
        return a.float() if narrow else a

    with no_autocast(x):  # backward may run inside the caller's autocast
        x, *weights = (plain(a, 0) for a in operands[:5])
        x = x if x.dim() == 3 else x.unsqueeze(0)
        states = (plain(a, leading) for a in operands[5:7])
        layer = x, *weights, *states, *operands[7:]
        dh, dh_n, dc_n, dc = incoming
        axes = next((a.dim() - 2 for a in (dh_n, dc_n) if a is not None), 0)
        incoming = plain(dh, 0), plain(dh_n, axes), plain(dc_n, axes), None if narrow else dc
        name = ctx.plan_or_name.backend
        if not ctx.plan_or_name.keeps_cells:  # run again: the buffers that the plan kept have no gradients
            h, _, _, *others = LSTMFunction.apply(*layer, ctx.reverse, name)
            kept = h, *others
        gradients = LSTMBackward.apply(*incoming, *layer, *kept, ctx.reverse, [*needs], name)
        return (*(_like(g, of) for g, of in zip(gradients, operands)),)


def _like(gradient: Optional, of: Optional) -> Optional:
    """Return a gradient in the type and the shape of its operand. The shapes may differ by an axis of one."""
    if gradient is None or of is None:
        return None
    gradient = gradient.to(of.dtype)
    axes = of.dim() - gradient.dim()
    return gradient if axes == 0 else gradient.unsqueeze(0) if axes > 0 else gradient.squeeze(0)


def _saving(*args: Any) -> tuple[Optional, ...]:
    *operands, reverse, backend = args
    return operators.forward(*operands, reverse, True, backend)


class WithoutGradients:
    """`operators.forward` under any number of `vmap` levels, for calls without derivatives."""

    @staticmethod
    def apply(*args: Any) -> tuple[Optional, ...]:
        if transformed() and levels.takes():
            return cast(tuple[Optional, ...], levels.apply(WithoutGradients, *args))
        return operators.forward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return forward_rule(WithoutGradients.apply, operators.forward, info.batch_size, in_dims, *args)


def differentiable(layer: Layer, cells: bool, backend: str) -> tuple[Any, ...]:
    """Return a layer's ``h, h_n, c_n, c``, under any transform. c is empty unless `cells` or a derivative is wanted."""
    if wants_autograd(*layer.tensors):
        return LSTMFunction.apply(*layer.tensors, layer.reverse, backend)[:4]
    return WithoutGradients.apply(*layer.tensors, layer.reverse, cells, backend)[:4]


def take_rows(a: Tensor, order: Tensor, axis: int) -> Tensor:
    """Return the rows of `a` along `axis` in `order`, a permutation. Equivalent to ``a.index_select(axis, order)``.

    The backward pass of index_select adds row by row. This one selects rows in the inverse order.
    """
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


def narrowed(results: tuple[Any, ...], dtype: torch.dtype, given: tuple[Optional, ...]) -> tuple[Any, ...]:
    """Return float32 results of a layer in `dtype`, the 16-bit type of the tensors that it was `given`.

    Equivalent to `Tensor.to` for each result, with one addition: if a given tensor is changed in place before the
    backward pass, that pass raises. Autograd itself saved only float32 copies, and would not notice.
    """
    if wants_gradient(*results) and is_untransformed(*results, *given):
        return cast(tuple[Any, ...], _Narrowed.apply(dtype, len(results), *results, *given))
    return (*(None if a is None else a.to(dtype) for a in results),)


class _Narrowed(Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, count: int, *tensors: Any) -> tuple[Optional, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        return (*(None if a is None else a.to(dtype) for a in tensors[:count]),)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        given = ctx.saved_tensors  # raises if one was changed
        return None, None, *(None if g is None else g.float() for g in grads), *(None for _ in given)
