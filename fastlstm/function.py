"""The autograd Functions: what is saved, which gradients, and every transform of them.

`LSTMFunction` runs a layer in one direction, `LSTMBackward` its gradients. Both define setup_context, jvp and vmap;
derivatives beyond the fused ones are those of the reference backend's maths. Equivalent to the derivatives of
`torch.nn.LSTM`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastlstm import ops
from fastlstm.backends import reference

Optional = Tensor | None


class _Function(Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        # with a setup_context, Function.apply binds forward's signature at every call: 18 of its 25 microseconds
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*args)  # type: ignore[misc]


class LSTMBackward(_Function):
    """Gradients of one layer. Differentiable in its first ten arguments; h, c and gates are buffers that a second
    derivative computes again from the inputs.
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
        ctx.reverse, ctx.needs = inputs[14:16]
        ctx.save_for_backward(*inputs[:11])
        ctx.save_for_forward(*inputs[:11])

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        with _no_autocast(inputs[4]):
            function, primals, where = _gradients_of(inputs, ctx.reverse, ctx.needs)
            outputs, vjp = torch.func.vjp(function, *primals)  # type: ignore[misc]
            given = [g for g, need in zip(grads, [*ctx.needs, True, True]) if need]
            results = vjp(tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, given)))
        return _scatter(results, where, 17)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        inputs = ctx.saved_tensors
        function, primals, where = _gradients_of(inputs, ctx.reverse, ctx.needs)
        results = iter(_jvp(function, primals, [tangents[i] for i in where]))
        return tuple(next(results) if need else None for need in [*ctx.needs, True, True])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        rows = [_fold(a, d, size, axis) for a, d, axis in zip(args, in_dims, (1, 0, 0, 1, 1))]
        # one gradient a sample: one group a sample, even where the weights are shared
        weights = [_stack(a, d, size, rank) for a, d, rank in zip(args[5:8], in_dims[5:8], (2, 2, 1))]
        states = [_fold(a, d, size, axis) for a, d, axis in zip(args[8:14], in_dims[8:14], (0, 0, 1, 1, 1))]
        states.append(_fold(args[13], in_dims[13], size, args[13].dim() - 2 - (in_dims[13] is not None)))
        gradients = LSTMBackward.apply(*rows, *weights, *states, *args[14:])
        axes = (1, 0, 0, 0, 0, 0)
        groups = [None if a is None else a.dim() - (d is not None) for a, d in zip(args[5:8], in_dims[5:8])]
        for index, dims in zip((1, 2, 3), groups):
            gradient = gradients[index]
            if gradient is not None and dims == (2 if index == 3 else 3):  # the stack held groups of its own
                gradients = (*gradients[:index], gradient.unflatten(0, (size, -1)), *gradients[index + 1 :])
        out = [
            g if g is None or k in (1, 2, 3) else g.unflatten(axis, (size, -1))
            for k, (g, axis) in enumerate(zip(gradients, axes))
        ]
        return tuple(out), tuple(None if g is None else axis for g, axis in zip(out, axes))


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
    ) -> tuple[Tensor, ...]:
        return ops.forward(x, weight_ih, weight_hh, bias, h_0, c_0, mask, reverse, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        h, _, _, c, gates = output
        ctx.mark_non_differentiable(gates)
        ctx.set_materialize_grads(False)
        ctx.reverse, ctx.backend = inputs[7:9]
        ctx.save_for_backward(*inputs[:7], h, c, gates)
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def backward(ctx: Any, dh: Optional, dh_n: Optional, dc_n: Optional, dc: Optional, _: Any) -> tuple[Any, ...]:
        inputs, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:4])
        call: Callable[..., Any] = LSTMBackward.apply if torch.is_grad_enabled() else ops.backward
        with _no_autocast(inputs[0]):  # backward may run inside the caller's autocast
            gradients = call(dh, dh_n, dc_n, dc, *inputs, ctx.reverse, needs, ctx.backend)
        return *gradients, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Optional, ...]:
        function, primals, where = _outputs_of(ctx.saved_tensors, ctx.reverse)
        return *_jvp(function, primals, [tangents[i] for i in where]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        weights: Sequence[Any] = args[1:4]
        if any(d is not None for d in in_dims[1:4]) or weights[0].dim() == 3:
            weights = [_stack(a, d, size, rank) for a, d, rank in zip(weights, in_dims[1:4], (2, 2, 1))]
        x, h_0, c_0, mask = (_fold(args[k], in_dims[k], size, axis) for k, axis in zip((0, 4, 5, 6), (1, 0, 0, 1)))
        h, h_n, c_n, c, gates = LSTMFunction.apply(x, *weights, h_0, c_0, mask, *args[7:])
        rows = gates.dim() - 2
        outputs = (
            *(a.unflatten(axis, (size, -1)) for a, axis in zip((h, h_n, c_n, c), (1, 0, 0, 1))),
            gates.unflatten(rows, (size, -1)),
        )
        return outputs, (1, 0, 0, 1, rows)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    device = tensor.device.type
    return torch.autocast("cpu" if device == "meta" else device, enabled=False)


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


def _present(inputs: tuple[Any, ...], count: int) -> list[int]:
    return [k for k in range(count) if inputs[k] is not None]


def _outputs_of(inputs: tuple[Any, ...], reverse: bool) -> tuple[Any, list[Tensor], list[int]]:
    """The reference forward as a function of those of its first six inputs that are there."""
    where = _present(inputs, 6)

    def function(*primals: Tensor) -> tuple[Tensor, ...]:
        full = [*inputs[:7], reverse, True]
        for k, primal in zip(where, primals):
            full[k] = primal
        return reference.forward(*full)[:4]

    return function, [inputs[k] for k in where], where


def _gradients_of(inputs: tuple[Any, ...], reverse: bool, needs: list[bool]) -> tuple[Any, list[Tensor], list[int]]:
    """The reference backward, the forward included, as a function of those of its first ten inputs that are there."""
    where = _present(inputs, 10)

    def function(*primals: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs[:11])
        for k, primal in zip(where, primals):
            full[k] = primal
        h, _, _, c, gates = reference.forward(*full[4:], reverse, True)  # type: ignore[call-arg]
        gradients = reference.backward(*full, h, c, gates, reverse, needs)  # type: ignore[call-arg]
        return tuple(g for g in gradients if g is not None)

    return function, [inputs[k] for k in where], where


def _jvp(function: Any, primals: list[Tensor], tangents: list[Optional]) -> tuple[Tensor, ...]:
    # torch.func.jvp would nest forward-mode levels, which dual_level refuses: the vjp of the vjp is the same map
    outputs, vjp = torch.func.vjp(function, *primals)  # type: ignore[misc]
    zeros = tuple(torch.zeros_like(o) for o in outputs)
    given = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents))
    return torch.func.vjp(lambda u: vjp(u), zeros)[1](given)[0]


def _scatter(values: tuple[Tensor, ...], where: list[int], size: int) -> tuple[Optional, ...]:
    slots: list[Optional] = [None] * size
    for k, value in zip(where, values):
        slots[k] = value
    return tuple(slots)
