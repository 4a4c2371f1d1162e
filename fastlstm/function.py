"""The autograd Functions: what is saved, which gradients, and every transform of them.

`LSTMFunction` runs a layer in one direction, `LSTMBackward` its gradients. Both define setup_context, jvp and vmap;
derivatives beyond the fused ones are `fastlstm.linearized`'s maths, with the fused backward where it is linear.
Where nothing is transformed `fastlstm.eager` has shorter ones. Equivalent to the derivatives of `torch.nn.LSTM`.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import Function

from fastlstm import levels, ops
from fastlstm.backends.memory import empty
from fastlstm.linearized import Linearized, WeightTangents
from fastlstm.tracing import skip_frame

Optional = Tensor | None


def sum_of_biases(bias_ih: Optional, bias_hh: Optional) -> Optional:
    return bias_hh if bias_ih is None else bias_ih if bias_hh is None else bias_ih + bias_hh


def wants_gradient(*tensors: Optional) -> bool:
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)


def wants_autograd(*tensors: Tensor | None) -> bool:
    """True where the call must leave a trace for a derivative of any kind, or runs under a transform."""
    if wants_gradient(*tensors):
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    # a batched tensor does not tell whether what it holds requires a gradient
    only_vmap = not torch.is_grad_enabled() and levels_of(TransformType.Vmap) == len(_interpreters())
    return torch._C._are_functorch_transforms_active() and not only_vmap


def _interpreters() -> list[Any]:
    return torch._C._functorch.get_interpreter_stack() or []


def levels_of(kind: TransformType) -> int:
    """How many transforms of this kind are active, one inside the other."""
    return sum(level.key() == kind for level in _interpreters())


class _Function(Function):
    @classmethod
    @skip_frame  # a graph may break around a call, or its backward pass run within: dynamo fails at these `super`s
    def apply(cls, *args: Any) -> Any:
        # with a setup_context, Function.apply binds forward's signature at every call: 18 of its 25 microseconds
        if torch._C._are_functorch_transforms_active():
            return levels.apply(cls, *args) if levels.takes() else super().apply(*args)
        return super(Function, cls).apply(*args)  # type: ignore[misc]


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
        bias: Optional,
        h_0: Tensor,
        c_0: Tensor,
        mask: Optional,
        h: Tensor,
        c: Tensor,
        gates: Tensor,
        reverse: bool,
        needs: list[bool],
        backend: str,
    ) -> tuple[Optional, ...]:
        tensors = (dh, dh_n, dc_n, dc, x, weight_ih, weight_hh, bias, h_0, c_0, mask, h, c, gates)
        return ops.backward(*tensors, reverse, needs, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.reverse, ctx.needs, ctx.backend = inputs[14:]
        ctx.save_for_backward(*inputs[:14])
        ctx.save_for_forward(*inputs[:14])

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        dh, dh_n, dc_n, dc, x, _, _, _, h_0, c_0, *_ = inputs = ctx.saved_tensors
        v_x, v_ih, v_hh, v_bias, v_h_0, v_c_0 = grads
        with no_autocast(x):
            layer, along = Linearized(*inputs[4:13], reverse=ctx.reverse), WeightTangents(v_ih, v_hh, v_bias)
            dpreact, dh_all, dc_all = layer.gradient(dh, dh_n, dc_n, dc)
            v_h_0 = torch.zeros_like(h_0) if v_h_0 is None else v_h_0
            v_c_0 = torch.zeros_like(c_0) if v_c_0 is None else v_c_0
            preact, h, c = layer.tangent(layer.preact_tangent(v_x, along, None), v_h_0, v_c_0)
            h_prev, c_prev = layer.before(h, v_h_0), layer.before(c, v_c_0)
            change, d_c_prev = layer.curvature(dh_all, dc_all, preact, c_prev)
            wanted = list(ctx.needs_input_grad[4:8])
            *products, d_h_prev = layer.products(change, dpreact, v_x, along, h_prev, wanted)
            (d_h, d_h_0), (d_c, d_c_0) = layer.after(d_h_prev), layer.after(d_c_prev)
        last = layer.order[-1]
        incoming = [None if a is None else g for a, g in zip((dh, dh_n, dc_n, dc), (h, h[last], c[last], c))]
        # what h and c get goes on through LSTMFunction's own backward
        return *incoming, *products, d_h_0, d_c_0, None, d_h, d_c, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        dh, dh_n, dc_n, dc, *inputs, gates = ctx.saved_tensors
        dh_t, dh_n_t, dc_n_t, dc_t, x_t, ih_t, hh_t, bias_t, h_0_t, c_0_t, _, h_t, c_t, *_ = tangents
        layer, along = Linearized(*inputs, reverse=ctx.reverse), WeightTangents(ih_t, hh_t, bias_t)
        h_0, c_0, _, h, c = inputs[4:]
        h_t, h_0_t, c_t, c_0_t = (
            torch.zeros_like(a) if t is None else t for a, t in ((h, h_t), (h_0, h_0_t), (c, c_t), (c_0, c_0_t))
        )
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
        return _vmap_backward(LSTMBackward.apply, info.batch_size, in_dims, *args)


class LSTMFunction(_Function):
    """One layer in one direction: ``h`` (T,B,H), ``h_n``, ``c_n`` (B,H), ``c`` (T,B,H) and the gates,
    which are a buffer.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Optional,
        h_0: Tensor,
        c_0: Tensor,
        mask: Optional,
        reverse: bool,
        backend: str,
        packed: Any = None,
    ) -> tuple[Tensor, ...]:
        if packed is not None and (result := packed.forward(x, (h_0, c_0), reverse, save=True)) is not None:
            return result
        return ops.forward(x, weight_ih, weight_hh, bias, h_0, c_0, mask, reverse, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, _, _, c, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.reverse, ctx.backend, *packed = inputs[7:]
        # a reference that does not keep the copies of an older update's weights
        ctx.packed = weakref.ref(packed[0]) if packed and packed[0] is not None else lambda: None
        ctx.save_for_backward(*inputs[:7], h, c, gates)
        ctx.save_for_forward(*inputs[:7], h, c)

    @staticmethod
    def backward(ctx: Any, dh: Optional, dh_n: Optional, dc_n: Optional, dc: Optional, _: Any) -> tuple[Any, ...]:
        inputs, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:6])
        call: Callable[..., Any] = LSTMBackward.apply
        ready: tuple[Any, ...] = ()
        if not (differentiated() or torch._C._are_functorch_transforms_active()):
            call, packed = ops.backward, ctx.packed()
            if packed is not None and not packed.stale and packed.is_as_saved(*inputs[1:3]):
                ready = (packed,)
        with no_autocast(inputs[0]):  # backward may run inside the caller's autocast
            gradients = call(dh, dh_n, dc_n, dc, *inputs, ctx.reverse, needs, ctx.backend, *ready)
        return *gradients, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        x_t, ih_t, hh_t, bias_t, h_0_t, c_0_t, *_ = tangents
        layer = Linearized(*ctx.saved_tensors, reverse=ctx.reverse)
        h_0_t, c_0_t = (torch.zeros_like(layer.c_prev[0]) if t is None else t for t in (h_0_t, c_0_t))
        _, h, c = layer.tangent(layer.preact_tangent(x_t, WeightTangents(ih_t, hh_t, bias_t), None), h_0_t, c_0_t)
        last = layer.order[-1]
        return h, h[last].clone(), c[last].clone(), c, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_forward(LSTMFunction.apply, info.batch_size, in_dims, *args)


class WithoutGradients:
    """`ops.forward` under any levels of `vmap`."""

    @staticmethod
    def apply(*args: Any) -> tuple[Tensor, ...]:
        if torch._C._are_functorch_transforms_active() and levels.takes():
            return levels.apply(WithoutGradients, *args)
        return ops.forward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _vmap_forward(WithoutGradients.apply, info.batch_size, in_dims, *args)


def zero_held(h: Tensor, held: Tensor) -> Tensor:
    """`h` (T,B,H) with zeros where `held` (T,B,1). Equivalent to `masked_fill`, but in memory that is used again: fresh
    pages both ways cost a training step more than the filling does.
    """
    if not ops.is_untransformed(h, held):
        return h.masked_fill(held, 0)
    return _ZeroHeld.apply(h, held)


def join(parts: list[Tensor]) -> Tensor:
    """The directions' features side by side. Equivalent to ``torch.cat(parts, -1)``, in such memory."""
    if len(parts) == 1:
        return parts[0]
    if not ops.is_untransformed(*parts):
        return torch.cat(parts, -1)
    return _Join.apply(*parts)


def take_rows(a: Tensor, order: Tensor, axis: int) -> Tensor:
    """The rows of `a` along an axis in `order`, a permutation. Equivalent to ``a.index_select(axis, order)``, in such
    memory, and the gradient is taken likewise, not added up row by row.
    """
    if not ops.is_untransformed(a, order):
        return a.index_select(axis, order)
    return _TakeRows.apply(a, order, axis)


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, order: Tensor, axis: int) -> Tensor:
        ctx.axis = axis
        ctx.save_for_backward(order)
        return torch.index_select(a, axis, order, out=empty(a, *a.shape))

    @staticmethod
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return take_rows(da, order.argsort(), ctx.axis), None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [a.shape[-1] for a in parts]
        return torch.cat(parts, -1, out=empty(parts[0], *parts[0].shape[:-1], sum(ctx.sizes)))

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, ...]:
        return dh.split(ctx.sizes, -1)


class _ZeroHeld(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, held: Tensor) -> Tensor:
        ctx.save_for_backward(held)
        return torch.where(held, h.new_zeros(()), h, out=empty(h, *h.shape))

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        return zero_held(dh, *ctx.saved_tensors), None


def differentiated() -> bool:
    """Whether what a backward pass computes is differentiated itself, in either mode."""
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    device = "cpu" if tensor.device.type == "meta" else tensor.device.type
    if not torch.is_autocast_enabled(device):  # a context costs 10 microseconds
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _fold(a: Optional, dim: int | None, size: int, axis: int) -> Optional:
    """vmap's axis goes in front of the batch rows at `axis`."""
    if a is None:
        return None
    a = a.unsqueeze(0).expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
    return a.movedim(0, axis).flatten(axis, axis + 1)


def _stack(a: Optional, dim: int | None, size: int, rank: int) -> Optional:
    """vmap's axis becomes the group axis of a weight (`rank` 2) or bias (1), or its slower part where there was one."""
    if a is None:
        return None
    a = a.unsqueeze(0).expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
    return a.flatten(0, 1) if a.dim() > rank + 1 else a


def _vmap_forward(call: Callable[..., Any], size: int, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    weights: Sequence[Any] = args[1:4]
    if any(d is not None for d in in_dims[1:4]) or weights[0].dim() == 3:
        weights = [_stack(a, d, size, rank) for a, d, rank in zip(weights, in_dims[1:4], (2, 2, 1))]
    x, h_0, c_0, mask = (_fold(args[k], in_dims[k], size, axis) for k, axis in zip((0, 4, 5, 6), (1, 0, 0, 1)))
    outputs = call(x, *weights, h_0, c_0, mask, *args[7:])
    axes = [None if a.dim() == 1 else axis for a, axis in zip(outputs, (1, 0, 0, 1, outputs[4].dim() - 2))]
    return tuple(a if axis is None else a.unflatten(axis, (size, -1)) for a, axis in zip(outputs, axes)), tuple(axes)


def _vmap_backward(call: Callable[..., Any], size: int, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    rows = [_fold(a, d, size, axis) for a, d, axis in zip(args, in_dims, (1, 0, 0, 1, 1))]
    # one gradient a sample: one group a sample, even where the weights are shared
    weights = [_stack(a, d, size, rank) for a, d, rank in zip(args[5:8], in_dims[5:8], (2, 2, 1))]
    states = [_fold(a, d, size, axis) for a, d, axis in zip(args[8:13], in_dims[8:13], (0, 0, 1, 1, 1))]
    gates = _fold(args[13], in_dims[13], size, args[13].dim() - 2 - (in_dims[13] is not None))
    dx, *of_weights, dh_0, dc_0 = call(*rows, *weights, *states, gates, *args[14:])
    for k, rank in enumerate((2, 2, 1)):
        a, d = args[5 + k], in_dims[5 + k]
        if of_weights[k] is not None and a.dim() - (d is not None) > rank:  # the stack held groups of its own
            of_weights[k] = of_weights[k].unflatten(0, (size, -1))
    dx, dh_0, dc_0 = (a if a is None else a.unflatten(axis, (size, -1)) for a, axis in zip((dx, dh_0, dc_0), (1, 0, 0)))
    out = (dx, *of_weights, dh_0, dc_0)
    return out, tuple(None if a is None else axis for a, axis in zip(out, (1, 0, 0, 0, 0, 0)))


# The operators' own rules: a loaded export, whose graph holds operators and no Functions, trains and takes vmap too.


def _setup_forward_op(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    LSTMFunction.setup_context(ctx, (*inputs[:8], inputs[9]), output)
    ctx.saved = inputs[8]


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
    return _vmap_forward(ops.forward, info.batch_size, in_dims, *args)


def _vmap_backward_op(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    outputs, dims = _vmap_backward(ops.backward, info.batch_size, in_dims, *args)
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
    bias: Optional,
    h_0: Tensor,
    c_0: Tensor,
    mask: Optional,
    reverse: bool,
    cells: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = x, weight_ih, weight_hh, bias, h_0, c_0, mask, reverse
    if wants_autograd(x, weight_ih, weight_hh, bias, h_0, c_0):
        h, h_n, c_n, c, _ = LSTMFunction.apply(*call, backend)
    else:
        h, h_n, c_n, c, _ = WithoutGradients.apply(*call, cells, backend)
    return h, h_n, c_n, c if cells else x.new_empty(0)


# What `torch.jit.trace` records. It is taken apart at each call, and so may be trained, or run without what training
# saves, whatever it was traced with.
layer_op = ops.define("layer", _layer, "CompositeImplicitAutograd")
