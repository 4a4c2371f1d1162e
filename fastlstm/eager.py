"""The autograd Functions of calls under no transform, with weights whose biases are apart.

LSTMFunction's transforms, and the nodes around it for the sum of biases and the states' layer axis, take longer than
the arithmetic of a step or of a short sequence. What only that one can do, these leave to it.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm import dispatch, ops
from fastlstm.backends.memory import converted, unpooled
from fastlstm.backends.reference import HOLD
from fastlstm.function import LSTMBackward, LSTMFunction, differentiated, for_biases, no_autocast
from fastlstm.torch_private import plain_apply

Optional = Tensor | None


class LSTMSequence(Function):
    """A layer over a whole sequence: ``h`` (T,B,H), ``h_n`` and ``c_n`` (B,H), and ``c`` (T,B,H), which a second
    derivative goes through, from ``x`` (T,B,I) and states (B,H), or None for zeros; with `layer_axis` states in and out
    are (1,B,H). `packed` are the weights as the backend keeps them, or None; it has to be one that takes biases apart.

    With `hides`, h is a tensor beside the one that is saved, with zeros at held steps, whose gradient nobody reads.

    Numbers of 16 bits are widened here, in memory that is used again, but those of bfloat16 that the backend takes;
    without ``c``, since a second derivative runs the layer once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Optional,
        bias_hh: Optional,
        h_0: Optional,
        c_0: Optional,
        mask: Optional,
        reverse: bool,
        hides: bool,
        layer_axis: bool,
        backend: str,
        packed: Any,
    ) -> tuple[Tensor, ...]:
        inputs = x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0
        narrow, taken = x.itemsize == 2, _taken(x, backend)
        result = shown = None
        if packed is not None:
            a, *states = _widened((x, h_0, c_0), 0) if narrow else (x, h_0, c_0)
            hx = None if h_0 is None else states
            result = packed.inner.forward(a, hx, reverse, save=True, layer_axis=layer_axis)
            packed.stale = packed.stale or result is None
        if result is None:
            wide: Any = _widened(inputs, taken) if narrow else inputs
            a, w_ih, w_hh, b_ih, b_hh, *states = wide
            run = dispatch.module(backend).forward
            shown = unpooled(a, *a.shape[:2], weight_hh.shape[1]) if hides else None
            options: Any = {"bias_hh": b_hh, "layer_axis": layer_axis, "shown": shown}
            result = run(a, w_ih, w_hh, b_ih, *states, mask, reverse, True, **options)
        h, h_n, c_n, c, gates = result
        ctx.set_materialize_grads(False)
        ctx.reverse, ctx.hides, ctx.layer_axis, ctx.backend = reverse, hides, layer_axis, backend
        ctx.packed = None if packed is None else weakref.ref(packed)
        ctx.save_for_backward(*inputs, mask, h, c, gates)
        output = h if shown is None else shown
        return _narrowed((output, h_n, c_n), x.dtype) if narrow else (output, h_n, c_n, c)

    @staticmethod
    def backward(ctx: Any, *incoming: Optional) -> tuple[Any, ...]:
        x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask, h, c, gates = ctx.saved_tensors
        to_x, to_ih, to_hh, to_bias_ih, to_bias_hh, to_h_0, to_c_0, *_ = ctx.needs_input_grad
        needs = [to_x, to_ih, to_hh, to_bias_ih or to_bias_hh, to_h_0, to_c_0]
        inputs = x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0
        if not differentiated() and ops.is_plain(*incoming, *inputs, mask, h, c, gates):
            packed = None if ctx.packed is None else ctx.packed()
            if packed is not None:
                unchanged = not packed.stale and packed.is_as_saved(weight_ih, weight_hh)
                packed = packed.inner if unchanged and not packed.inner.stale else None
            dtype, narrow, taken = x.dtype, x.itemsize == 2, _taken(x, ctx.backend)
            if narrow:  # again: kept, they would be twice the memory of what they are copies of
                if packed is not None:  # those of the forward pass, whatever has been written to theirs since
                    inputs = x, packed.weight_ih, packed.weight_hh, *inputs[3:]
                x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0 = _widened(inputs, taken)
                incoming = *_widened(incoming, 1 if taken else 0), None
            bias = bias_ih if bias_hh is None else bias_hh
            tensors = *incoming, x, weight_ih, weight_hh, bias, h_0, c_0, mask, h, c, gates
            gradients = dispatch.module(ctx.backend).backward(*tensors, ctx.reverse, needs, packed, hides=ctx.hides)
            if narrow:
                gradients = _narrowed(gradients, dtype)
        else:
            gradients = _composed(ctx, incoming, inputs, mask, (h, c, gates), needs)
        dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0 = gradients
        if ctx.layer_axis:
            dh_0, dc_0 = (a if a is None else a.unsqueeze(0) for a in (dh_0, dc_0))
        dbias_ih, dbias_hh = for_biases(dbias, to_bias_ih, to_bias_hh)
        return dx, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dh_0, dc_0, None, None, None, None, None, None


sequence = plain_apply(LSTMSequence)


def _composed(
    ctx: Any,
    incoming: tuple[Optional, ...],
    inputs: tuple[Any, ...],
    mask: Optional,
    kept: tuple[Tensor, ...],
    needs: list[bool],
) -> tuple[Optional, ...]:
    """LSTMSequence's gradients by Functions that can be differentiated again."""
    dtype = inputs[0].dtype
    narrow = dtype.itemsize == 2
    with no_autocast(inputs[0]):  # backward may run inside the caller's autocast
        if narrow:
            inputs, incoming = (
                (*(a if a is None else a.float() for a in tensors),) for tensors in (inputs, (*incoming, None))
            )
        x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0 = inputs
        dh, dh_n, dc_n, dc = incoming
        if ctx.layer_axis:
            dh_n, dc_n, h_0, c_0 = (a if a is None else a.squeeze(0) for a in (dh_n, dc_n, h_0, c_0))
        layer = x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask
        if ctx.hides:
            held: Any = mask == HOLD
            dh = dh if dh is None else dh.masked_fill(held.unsqueeze(-1), 0)
        if narrow or ctx.hides:  # what was kept is nobody's output
            h, _, _, c, gates = LSTMFunction.apply(*layer, ctx.reverse, ctx.backend)
            kept = h, c, gates
        gradients = LSTMBackward.apply(dh, dh_n, dc_n, dc, *layer, *kept, ctx.reverse, needs, ctx.backend)
    return (*(a if a is None else a.to(dtype) for a in gradients),)


def _taken(x: Tensor, backend: str) -> int:
    """How many of the first inputs, x and the weights, the backend takes in 16 bits."""
    return 3 if x.dtype is torch.bfloat16 and dispatch.traits(backend).takes_bfloat16 else 0


def _widened(tensors: Sequence[Optional], taken: int) -> tuple[Optional, ...]:
    """All but the first `taken` in float32."""
    return (
        *(
            a if a is None or k < taken or a.itemsize > 2 else converted(a, torch.float32)
            for k, a in enumerate(tensors)
        ),
    )


def _narrowed(tensors: Sequence[Optional], dtype: torch.dtype) -> tuple[Any, ...]:
    return (*(a if a is None or a.dtype is dtype else converted(a, dtype, unpooled) for a in tensors),)


def _step_backward(
    dh: Optional,
    dc: Optional,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional,
    bias_hh: Optional,
    h_0: Tensor,
    c_0: Tensor,
    kept: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Optional, ...]:
    """LSTMStep's gradients from the gates and cell state that it kept, with weights that are packed for this call."""
    (B, H), module = h_0.shape, dispatch.module(backend)
    shape = module.saved_shape(1, B, H, x.dtype)
    gates, c = kept.split((kept.numel() - B * H, B * H))
    c = c.view(1, B, H)
    layer = x.unsqueeze(0), weight_ih, weight_hh, bias_ih if bias_hh is None else bias_hh, h_0, c_0, None
    # of one step h is not looked at
    dx, *others = module.backward(None, dh, dc, None, *layer, c, c, gates.view(shape), False, needs)
    return dx if dx is None else dx.squeeze(0), *others


class LSTMStep(Function):
    """One time step with weights that stay packed: ``h`` and ``c`` (B,H) from ``x`` (B,I). A second derivative runs it
    again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Optional,
        bias_hh: Optional,
        h_0: Tensor,
        c_0: Tensor,
        packed: Any,
    ) -> tuple[Tensor, Tensor]:
        result = packed.step(x, h_0, c_0, save=True)
        if result is None:  # the weights have changed: the next call packs them again
            inputs = x.unsqueeze(0), weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, None
            result = *ops.forward(*inputs, False, False, packed.backend)[1:3], None
        h, c, kept = result
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.packed = packed.backend, weakref.ref(packed)
        ctx.save_for_backward(x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, kept)
        return h, c

    @staticmethod
    def backward(ctx: Any, dh: Optional, dc: Optional) -> tuple[Any, ...]:
        x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, kept = ctx.saved_tensors
        to_x, to_ih, to_hh, to_bias_ih, to_bias_hh, to_h_0, to_c_0, _ = ctx.needs_input_grad
        needs = [to_x, to_ih, to_hh, to_bias_ih or to_bias_hh, to_h_0, to_c_0]
        packed, gradients = ctx.packed(), None
        if kept is not None and not differentiated() and ops.is_plain(dh, dc, x, weight_ih, weight_hh, h_0, c_0, kept):
            if packed is not None and not packed.stale and packed.is_as_saved(weight_ih, weight_hh):
                gradients = packed.step_backward(dh, dc, x, h_0, c_0, kept, needs)
            if gradients is None:  # the weights as they are now, as torch's own backward pass takes them
                gradients = _step_backward(
                    dh, dc, x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, kept, needs, ctx.backend
                )
        if gradients is None:
            inputs = x.unsqueeze(0), weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, None
            with no_autocast(x):
                h, _, _, c, gates = LSTMFunction.apply(*inputs, False, ctx.backend)
                tensors = None, dh, dc, None, *inputs, h, c, gates
                dx, *others = LSTMBackward.apply(*tensors, False, needs, ctx.backend)
            gradients = dx if dx is None else dx.squeeze(0), *others
        dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0 = gradients
        dbias_ih, dbias_hh = for_biases(dbias, to_bias_ih, to_bias_hh)
        return dx, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dh_0, dc_0, None


step = plain_apply(LSTMStep)
