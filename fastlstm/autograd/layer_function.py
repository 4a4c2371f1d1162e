"""The pair of autograd Functions: `LayerFunction` runs a layer in one direction, and `LayerBackward` its backward pass.

Both define ``vmap``. Forward mode and second derivatives are plain PyTorch: `fastlstm.backends.reference`.
`PlannedFunction` stands in for `LayerFunction` in calls that follow a plan.

The arguments are flat: first the tensors, in the order of `Layer.tensors`, and then the other arguments.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.func import vjp

from fastlstm.autograd import operators
from fastlstm.autograd.batching import backward_rule, forward_rule
from fastlstm.autograd.modes import has_saved_tensor_hooks, is_plain, no_autocast, wants_autograd
from fastlstm.backends import parts, reference
from fastlstm.backends.base import Gradients, Layer, Plan, Run, new_run
from fastlstm.backends.cpu import threads_now
from fastlstm.torch_private import dispatch_mode_count, dual_level, plain_apply, recognizer, transformed, when_compiling

Optional = Tensor | None


def _for_all(ctx: Any, *gradients: Optional) -> tuple[Optional, ...]:
    """Return a gradient for each of the `ctx.arguments` arguments of a call: None for those after the ones given."""
    return *gradients, *[None] * (ctx.arguments - len(gradients))


class _Function(Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        if transformed():
            return super().apply(*args)
        return plain_apply(cls)(*args)


def _leave_frame() -> None:
    """Hide `apply` from dynamo, which fails at its `super`. It meets `apply` where a graph breaks around a call."""
    apply = vars(_Function)["apply"].__func__
    _Function.apply = classmethod(torch.compiler.disable(apply))  # type: ignore[assignment]


when_compiling(_leave_frame)


class LayerBackward(_Function):
    """The gradients of one layer, in the order of its tensors.

    Args:
        args: those of `operators.backward`.

    It is differentiable in all tensors but lengths, reset and gates, a buffer of the backend. For a second derivative
    `reference` runs the backward pass again, which autograd differentiates. It takes the states of the run as given.
    The gradients of these states then go through `LayerFunction`'s own backward pass.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Optional, ...]:
        return operators.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.reverse, ctx.cell, ctx.needs, ctx.backend = inputs
        ctx.arguments = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        tensors, needs = [*ctx.saved_tensors], ctx.needs_input_grad
        wanted = [k for k in range(len(tensors)) if needs[k]]
        given = [k for k, (g, need) in enumerate(zip(grads, ctx.needs)) if need and g is not None]
        if not given:
            return _for_all(ctx)

        def gradients(*operands: Tensor) -> tuple[Any, ...]:
            for k, a in zip(wanted, operands):
                tensors[k] = a
            results = _plain_gradients(ctx.cell, ctx.reverse, tensors, ctx.needs)
            return (*(results[k] for k in given),)

        with no_autocast(tensors[2 * len(ctx.cell.states)]):
            product = _vector_product(gradients, [tensors[k] for k in wanted], [grads[k] for k in given])
            by_index = dict(zip(wanted, product))
        return _for_all(ctx, *(by_index.get(k) for k in range(len(tensors))))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return backward_rule(args[-3], LayerBackward.apply, operators.backward, info.batch_size, in_dims, *args)


class LayerFunction(_Function):
    """One layer in one direction: ``h`` (T, B, H), the last states (B, H), the other states (T, B, H) of all steps, and
    gates, a buffer. `args`: the layer's tensors, reverse, the cell, and a backend's name.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Optional, ...]:
        *tensors, reverse, cell, backend = args
        return operators.forward(*tensors, reverse, cell, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, ctx.reverse, ctx.cell, ctx.backend = inputs
        ctx.count, ctx.arguments = len(tensors), len(inputs)
        saved = *tensors, output[0], *output[1 + len(ctx.cell.states) :]
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        saved, incoming, needs = ctx.saved_tensors, grads[: 2 * len(ctx.cell.states)], ctx.needs_input_grad
        if all(g is None for g in incoming):
            return _for_all(ctx)
        rest = ctx.reverse, ctx.cell, [*needs[: ctx.count - 2]], ctx.backend
        with no_autocast(saved[0]):  # backward may run inside the caller's autocast
            return _for_all(ctx, *_gradients(*incoming, *saved, *rest))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return forward_rule(args[-2], LayerFunction.apply, LayerFunction.forward, info.batch_size, in_dims, *args)


def _vector_product(
    function: Callable[..., tuple[Tensor, ...]], operands: list[Tensor], directions: list[Any]
) -> Sequence[Optional]:
    """Return the gradients of a function's operands, from those of its results."""
    if not has_saved_tensor_hooks():  # which torch.func refuses
        transposed: Any = vjp(function, *operands)[1]
        return cast(Sequence[Optional], transposed((*directions,)))
    again = torch.is_grad_enabled()  # under torch.func, which refuses hooks too, this would lose the outer levels
    with torch.enable_grad():
        own = [a.view_as(a) if again else a.detach().requires_grad_() for a in operands]
        pairs = [(a, g) for a, g in zip(function(*own), directions) if a.requires_grad]
    if not pairs:
        return [None] * len(operands)
    results, incoming = zip(*pairs)
    return torch.autograd.grad(results, own, incoming, create_graph=again, allow_unused=True)


def _gradients(*args: Any) -> tuple[Optional, ...]:
    """Return the gradients of a layer, from the arguments of `operators.backward`."""
    if dual_level():  # the incoming gradients may have tangents
        *tensors, reverse, cell, needs, _ = args
        return _plain_gradients(cell, reverse, tensors, needs)
    call: Callable[..., Any] = LayerBackward.apply if torch.is_grad_enabled() or transformed() else operators.backward
    return cast(tuple[Optional, ...], call(*args))


def _plain_gradients(cell: Any, reverse: bool, tensors: Any, needs: Any) -> tuple[Optional, ...]:
    """Return the gradients of a layer in plain PyTorch, from the tensors of `operators.backward`'s arguments."""
    incoming, layer, run = operators.unflatten(cell, reverse, tensors)
    run = reference.run_of(layer, (run.h, *run.saved[:-1]))
    return reference.backward(incoming, layer, run, Gradients.of(cell, needs)).flat


class PlannedFunction(Function):
    """`LayerFunction` by a plan, for calls under no transform: ``h``, the last states, and, if the plan keeps them, the
    other states of all steps. `args`: the plan, the layer or all layers of a module, its `Token` and the token's tensor
    or None, and the tensors of the layer but lengths and reset, so that autograd sees them. With a token the weights
    are None.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Optional, ...]:
        plan, layer, token, *_ = args
        h, last, saved_values = plan.forward(layer)
        tensors = layer.x, *layer.weights, *layer.states, *layer.inputs, layer.lengths, layer.reset
        saved = *tensors, h if plan.reads_h else None, *saved_values
        plan.types = plan.types or types_of(saved)
        ctx.call = plan, layer.cell, (layer.reverse, layer.layers, layer.directions), len(tensors), token
        ctx.materialize_grads = False
        ctx.save_for_backward(*saved)
        return h, *last, *(saved_values[: -layer.parts] if plan.saves_sequences else ())

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Any, ...]:
        (plan, cell, axes, count, token), saved = ctx.call, ctx.saved_tensors
        are_undefined = [g is None for g in grads]
        if False not in are_undefined:
            return (None,) * len(ctx.needs_input_grad)
        needs: tuple[bool, ...] = ctx.needs_input_grad[4:]
        sums: Sequence[Any] | None = ()
        if (loop := plan.loop) is not None and loop.steps > 0:
            loop.end()
        if token is not None and (sums := token.sums(ctx) if isinstance(ctx, FunctionCtx) else ()) is not None:
            needs = needs[0], *token.needs, *needs[1 + len(token.needs) :]
        layer, h, saved_values = Layer.of(cell, saved[:count], *axes), saved[count], saved[count + 1 :]
        incoming, run = Run.of(len(cell.states), grads), new_run((h, (), saved_values))
        is_eager = not (torch.is_grad_enabled() or dual_level() or dispatch_mode_count() or torch.jit.is_tracing())
        more = (sums,) if type(sums) is list else ()
        key = needs, threads_now(), len(more), *are_undefined
        tensors = [a for a in (*saved, *grads) if a is not None]
        recognizes, form, own = plan.known.get(key, _NEVER)
        # the storages of the layer's own tensors may have been resized to nothing since
        is_known = is_eager and recognizes(*tensors) and 0 not in map(Tensor.data_ptr, tensors[:own])
        if not is_known:
            check_types(plan.types, saved)
            is_eager, form = is_eager and is_plain(*tensors), []
        if is_eager:
            gradients = plan.backward(incoming, layer, run, _record(cell, needs), form, *more).flat
        else:
            more = ()
            with no_autocast(layer.x):  # backward may run inside the caller's autocast
                gradients = _differentiable_gradients(plan, incoming, layer, (h, *saved_values), needs)
        if is_eager and not is_known:
            own = sum(a is not None for a in saved[:count])
            # neither a tensor that occurs twice would be recognized, nor one without numbers
            if len({*map(id, tensors)}) == len(tensors) and 0 not in map(Tensor.data_ptr, tensors[:own]):
                plan.known[key] = recognizer(tensors), form, own
        if token is None:
            return None, None, None, None, *gradients
        if more or sums is None:  # its kernel has added them to those of other steps, or nobody wants any
            return None, None, None, None, gradients[0], *[None] * len(token.needs), *gradients[1 + len(token.needs) :]
        # compiled autograd, whose `ctx` is of another class, adds whatever it is given
        return None, None, None, *token.leave(gradients, is_eager and isinstance(ctx, FunctionCtx))


def types_of(tensors: tuple[Optional, ...]) -> tuple[torch.dtype | None, ...]:
    """Return the dtypes of tensors, each of which may be None."""
    return tuple([None if a is None else a.dtype for a in tensors])


def check_types(types: tuple[torch.dtype | None, ...], saved: tuple[Optional, ...]) -> None:
    """Raise RuntimeError if saved tensors have other dtypes than in the forward pass: kernels would misread them."""
    if (types_now := types_of(saved)) != types:
        then, now = next((one, other) for one, other in zip(types, types_now) if one is not other)
        raise RuntimeError(
            f"a tensor of {then} that the backward pass reads has become {now} since the forward pass: call "
            "backward before the module changes its type; hooks of saved tensors must give back the type they got"
        )


_NEVER: Any = (lambda *_: False), [], 0  # recognizes no tensors
_apply_plan = plain_apply(PlannedFunction)


def run_plan(plan: Plan, layer: Layer) -> Run:
    """Run a layer by its plan, so that autograd sees it."""
    x, weights, others = layer.x, layer.weights, (*layer.states, *layer.inputs)
    if plan.loop is not None and (token := plan.loop.enter(weights)) is not None:
        h, *rest = _apply_plan(plan, layer, token, token.tensor, x, *[None] * len(weights), *others)
    else:
        h, *rest = _apply_plan(plan, layer, None, None, x, *weights, *others)
    if layer.directions == 2:
        h = h.clone()  # to which callers may write: torch joins both directions by a copy
    return new_run((h, (*rest[: len(layer.states)],), ()))  # other results of the plan are for its backward pass


_record = lru_cache(1024)(Gradients.of)  # of each cell a few choices of operands


def _differentiable_gradients(
    plan: Plan, incoming: Run, layer: Layer, saved: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Optional, ...]:
    """Return the gradients of a planned run, from Functions that can be differentiated again."""
    if layer.parts > 1:

        def of_parts(_: int, calls: list[Any]) -> list[Gradients]:
            return [
                Gradients.of(layer.cell, _differentiable_gradients(plan, grads, part, (run.h, *run.saved), wanted.flat))
                for grads, part, run, wanted in calls
            ]

        run = Run(saved[0], (), saved[1:])
        return parts.backward(incoming, layer, run, _record(layer.cell, needs), of_parts).flat
    cell, states, to = layer.cell, len(layer.cell.states), torch.promote_types(layer.x.dtype, torch.float32)

    has_layer_axis = layer.states[0] is not None and layer.states[0].dim() == 3
    tensors = layer.squeezed(has_layer_axis).to(to).tensors
    others = incoming.saved if plan.saves_sequences else (None,) * (states - 1)
    last = (None if a is None else a.reshape(a.shape[-2:]).to(to) for a in incoming.last)
    grads = None if incoming.h is None else incoming.h.to(to), *last, *others
    if not plan.saves_sequences:  # run again: the buffers that the plan saved have no gradients
        h, *again = LayerFunction.apply(*tensors, layer.reverse, cell, plan.backend)
        saved = h, *again[states:]
    gradients = _gradients(*grads, *tensors, *saved, layer.reverse, cell, [*needs], plan.backend)
    return (*(_like(g, of) for g, of in zip(gradients, layer.tensors)),)


def _like(gradient: Optional, of: Optional) -> Optional:
    """Return a gradient in the type and the shape of its operand. The shapes may differ by an axis of one."""
    return None if gradient is None or of is None else gradient.to(of.dtype).reshape(of.shape)


def differentiable(layer: Layer, inner_states: bool, backend: str) -> Run:
    """Run a layer under any transform. All inner states are saved if `inner_states` or a derivative is wanted."""
    if dual_level() and (transformed() or operators.any_tangent(*layer.tensors)):
        *results, _ = reference.forward(layer, True).flat
    elif wants_autograd(*layer.tensors):
        *results, _ = LayerFunction.apply(*layer.tensors, layer.reverse, layer.cell, backend)
    else:
        *results, _ = operators.forward(*layer.tensors, layer.reverse, layer.cell, inner_states, backend)
    return Run.of(len(layer.states), results)
