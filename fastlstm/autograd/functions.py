"""The one pair of autograd Functions: a layer in one direction, and its gradients.

Both define ``vmap`` and ``jvp``, and both can be differentiated again. The fused backward pass computes first
derivatives. What lies beyond them is the arithmetic of `fastlstm.autograd.linearized`, with the fused backward pass
where the result is linear in the incoming gradients. Equivalent to the derivatives of `torch.nn.LSTM`.

The arguments are flat: `Layer.tensors` and then what is no tensor.
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
from fastlstm.torch_private import plain_apply, transformed, when_compiling

Optional = Tensor | None
OPERANDS, GRADIENTS = 9, 7  # tensors of a layer, and how many of them have gradients


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
    """The gradients of one layer, in the order of its operands.

    Args:
        args: dh, dh_n, dc_n and dc; the layer's tensors; h, c and gates of its run; reverse, which gradients are wanted
            as seven booleans, and the backend's name.

    Differentiable in all tensors but lengths, reset and gates, which is a buffer. As h and c are arguments here, a
    second derivative is a loop each way and then `LSTMFunction`'s own backward pass.
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
        layer = Layer.of(operands, ctx.reverse)
        wanted = Gradients.of(ctx.needs_input_grad[4 : 4 + GRADIENTS])
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
        # what h and c get goes on through LSTMFunction's own backward
        return *incoming, *gradients, None, None, d_h, d_c, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        dh, dh_n, dc_n, dc, *operands, h, c, gates = ctx.saved_tensors
        dh_t, dh_n_t, dc_n_t, dc_t, x_t, ih_t, hh_t, b_ih_t, b_hh_t, h_0_t, c_0_t, _, _, h_t, c_t, *_ = tangents
        layer, needs = Layer.of(operands, ctx.reverse), Gradients.of(ctx.needs)
        around, along = Linearized(layer, h, c), WeightTangents(ih_t, hh_t, sum_of(b_ih_t, b_hh_t))
        h_t, c_t = (torch.zeros_like(a) if t is None else t for a, t in ((h, h_t), (c, c_t)))
        dpreact, dh_all, dc_all = around.gradient(dh, dh_n, dc_n, dc)
        h_prev, c_prev = around.h_before(h_t, h_0_t), around.c_before(c_t, c_0_t)
        preact = around.preact_tangent(x_t, along, h_prev)
        change, d_c_prev = around.curvature(dh_all, dc_all, preact, c_prev)
        dx, d_ih, d_hh, d_bias, d_h_prev = around.products(change, dpreact, x_t, along, h_prev, needs)
        (d_h, d_h_0), (d_c, d_c_0) = around.h_after(d_h_prev), around.c_after(d_c_prev)
        # linear in the incoming gradients: the fused backward takes what the steps change by as more of them
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
        args: the layer's tensors, reverse, and a backend's name or a `Plan` of it. With a plan of one step alone, or
            of 16 bits, what follows the states is all buffers.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Optional, ...]:
        way = args[-1]
        if isinstance(way, str):
            return operators.forward(*args[:-1], True, way)
        h, last, kept = way.forward(Layer.of(args[:OPERANDS], args[OPERANDS]))
        return h, *last, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.reverse, way = inputs[OPERANDS:]
        ctx.way, planned = way, not isinstance(way, str)
        saved = *inputs[:OPERANDS], output[0] if not planned or way.reads_h else None, *output[3:]
        ctx.mark_non_differentiable(*output[3 if planned and not way.keeps_cells else 4 :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        if not planned:  # a plan knows no forward mode
            ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dh: Optional, dh_n: Optional, dc_n: Optional, dc: Optional, *_: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        operands, (h, *kept) = saved[:OPERANDS], saved[OPERANDS:]
        incoming, needs = (dh, dh_n, dc_n, dc), ctx.needs_input_grad[:GRADIENTS]
        if isinstance(ctx.way, str):
            call: Callable[..., Any] = LSTMBackward.apply if differentiated() or transformed() else operators.backward
            with no_autocast(operands[0]):  # backward may run inside the caller's autocast
                gradients = call(*incoming, *operands, h, *kept, ctx.reverse, [*needs], ctx.way)
        elif not differentiated() and is_plain(*incoming, h, *kept):
            run, layer = Run(h, (None, None), tuple(kept)), Layer.of(operands, ctx.reverse)
            gradients = ctx.way.backward(Run(dh, (dh_n, dc_n), (dc,)), layer, run, Gradients.of(needs)).flat
        else:
            gradients = _composed(ctx, incoming, operands, (h, *kept), needs)
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        x_t, ih_t, hh_t, b_ih_t, b_hh_t, h_0_t, c_0_t, *_ = tangents
        *operands, h, c, _ = ctx.saved_tensors
        layer = Linearized(Layer.of(operands, ctx.reverse), h, c)
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
    """The gradients of a planned run by Functions that can be differentiated again."""
    x, given = operands[0], operands[5]
    leading = 0 if given is None else given.dim() - 2
    narrow = x.itemsize == 2

    def plain(a: Any, axes: int) -> Any:
        """Without a leading axis of one, if there is any, and in float32 where it was narrower."""
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
        name = ctx.way.backend
        if not ctx.way.keeps_cells:  # what was kept is nobody's output
            h, _, _, *others = LSTMFunction.apply(*layer, ctx.reverse, name)
            kept = h, *others
        gradients = LSTMBackward.apply(*incoming, *layer, *kept, ctx.reverse, [*needs], name)
        return (*(_like(g, of) for g, of in zip(gradients, operands)),)


def _like(gradient: Optional, of: Optional) -> Optional:
    """A gradient in the type and the shape of its operand, which differ by axes of one."""
    if gradient is None or of is None:
        return None
    gradient = gradient.to(of.dtype)
    axes = of.dim() - gradient.dim()
    return gradient if axes == 0 else gradient.unsqueeze(0) if axes > 0 else gradient.squeeze(0)


def _saving(*args: Any) -> tuple[Optional, ...]:
    *operands, reverse, backend = args
    return operators.forward(*operands, reverse, True, backend)


class WithoutGradients:
    """`operators.forward` under any levels of `vmap`."""

    @staticmethod
    def apply(*args: Any) -> tuple[Optional, ...]:
        if transformed() and levels.takes():
            return cast(tuple[Optional, ...], levels.apply(WithoutGradients, *args))
        return operators.forward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return forward_rule(WithoutGradients.apply, operators.forward, info.batch_size, in_dims, *args)


def differentiable(layer: Layer, cells: bool, backend: str) -> tuple[Any, ...]:
    """``h``, ``h_n``, ``c_n`` and, if `cells` or a derivative is wanted, ``c``, in a way that every transform takes."""
    if wants_autograd(*layer.tensors):
        return LSTMFunction.apply(*layer.tensors, layer.reverse, backend)[:4]
    return WithoutGradients.apply(*layer.tensors, layer.reverse, cells, backend)[:4]


def take_rows(a: Tensor, order: Tensor, axis: int) -> Tensor:
    """The rows of `a` along an axis in `order`, a permutation. Equivalent to ``a.index_select(axis, order)``, but the
    gradient is taken likewise, where that one's is added up row by row.
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
    """Results of a layer in a type of 16 bits, of which it was `given` tensors and computed with copies in float32.

    Equivalent to `Tensor.to` for each; but a given tensor that is changed in place before the backward pass is an error
    there, as it is where autograd saves it itself.
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
        given = ctx.saved_tensors  # raises for one that was changed
        return None, None, *(None if g is None else g.float() for g in grads), *(None for _ in given)
