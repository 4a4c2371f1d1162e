"""Which of four ways a call of one layer takes to a backend: docs/design.md has the ways, and what a plan is for.

A plan belongs to a *signature*: the shapes, types and settings of a call, and whether gradients are wanted. The first
call of a signature checks everything and keeps a plan, and later calls only run the plan.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlstm.autograd import rules  # noqa: F401  # which defines the operators of every cell
from fastlstm.autograd.elementary import narrowed
from fastlstm.autograd.functions import apply_plan, differentiable
from fastlstm.autograd.modes import (
    autocast_of,
    is_plain,
    nests_forward_mode,
    no_autocast,
    under_vmap,
    wants_gradient,
)
from fastlstm.autograd.operators import made
from fastlstm.backends import aten, dispatch, reference, settings
from fastlstm.backends.base import Layer, Plan, Run, empty_run
from fastlstm.backends.checks import check_layer
from fastlstm.backends.cpu import threads_now
from fastlstm.cells.spec import by_key
from fastlstm.torch_private import (
    allow_in_graph,
    dual_level,
    dual_level_in_graph,
    opened_by_graph,
    rnn_precision,
    transformed,
)

MOST = 4096  # plans of the whole process: of `numba`, each takes 8 KB, or 17 where a call trains
_UNKNOWN = object()  # marks a signature without an entry: None is the entry of one that can have no plan
Optional = Tensor | None
Runs = Callable[[Layer], Run]
Makes = Callable[[Layer, str | None, bool, dict[Any, Any] | None], Runs | None]


class Plans:
    """The plans of one layer and direction, and the packed weights that they share.

    It is empty until the first call. Copies and pickles of it are empty. Without `keeps`, weights are packed in each
    call. All `Plans` of a process together hold at most MOST plans.
    """

    __slots__ = ("__weakref__", "kept", "made")

    def __init__(self, keeps: bool = True) -> None:
        self.made: dict[Any, Runs | None] = {}
        self.kept: dict[Any, Any] | None = {} if keeps else None

    def __reduce__(self) -> tuple[type["Plans"], tuple[()]]:
        return Plans, ()

    def find(self, layer: Layer, backend: str | None, axis: bool) -> tuple[Any, Runs | None]:
        """Return (signature, None) if the signature is new, (None, plan) if not, (None, None) if no plan can serve.

        `axis`: whether the states are (1, B, H), as those of modules are, or (B, H).
        """
        x, weights, states, lengths, reset, reverse, cell, inputs, scales, activations = layer
        weights += scales
        buffers = weights if activations else ()  # looked at together, since one by one they would take twice as long
        if not is_plain(x, *states, lengths, reset, *inputs, *buffers) or transformed() or dual_level():
            return None, None
        of_weights: list[Any] = []
        of_states: list[Any] = []
        device, learns = x.device, False
        for a in weights:
            if a is None:
                of_weights.append(a)
            elif (type(a) is Parameter or activations or is_plain(a)) and a.device == device and not a.is_neg():
                of_weights.append((type(a), a.shape, a.dtype, a.is_contiguous()))
            else:
                return None, None
        if states[0] is not None:
            for a in states:  # `None in states` would compare tensors by their values
                if a is None or a.device != device:
                    return None, None
                of_states.append((a.shape, a.dtype, a.is_contiguous()))
        if torch.is_grad_enabled():
            for a in (*weights, x, *states, *inputs):  # faster than any() of so few
                if a is not None and a.requires_grad:
                    learns = True
                    break
        signature = (
            cell, activations, x.shape, x.stride(), x.dtype, device, reverse, axis,
            tuple([(a.shape, a.stride(), a.dtype, a.device) for a in inputs]) if inputs else None,
            None if lengths is None else lengths.stride(), None if reset is None else reset.stride(),
            autocast_of(x), settings.named(backend), rnn_precision(), threads_now(),
            x.numel() >= dispatch.MANY_NUMBERS and dispatch.takes_pieces(x),  # a short call would notice the second
            *of_weights, learns, *of_states,  # between the two, so that no state is taken for a weight
        )  # fmt: skip
        plan: Any = self.made.get(signature, _UNKNOWN)  # one look: another thread may drop what is there
        return (signature, None) if plan is _UNKNOWN else (None, plan)

    def get(self, layer: Layer, backend: str | None, axis: bool, make: Makes) -> Runs | None:
        """Return the plan of a call, or None if no plan can serve. A plan that is not there yet is made and kept.

        Args:
            make: is called with `layer`, `backend`, `axis` and the dictionary of packed weights. It returns the new
                plan, or None if no plan can serve, and its errors pass.
        """
        signature, plan = self.find(layer, backend, axis)
        if signature is None:
            return plan
        plan = self.made[signature] = make(layer, backend, axis, self.kept)
        _in_order.append((ref(self), signature))
        while len(_in_order) > MOST:
            with suppress(IndexError):  # another thread may be here as well
                owner, oldest = _in_order.popleft()
                if (plans := owner()) is not None:
                    plans.made.pop(oldest, None)
        return plan


_in_order: deque[tuple["ref[Plans]", Any]] = deque()  # the signatures of all plans and who holds them, the oldest first


def _plan(layer: Layer, backend: str | None, axis: bool, kept: dict[Any, Any] | None) -> Runs | None:
    """Make the plan of a plain call of floats, see `Plans.get`.

    Raises:
        ValueError: for tensors that make no layer.
        RuntimeError: if a backend that was asked for by name cannot run them.
    """
    learns, to = wants_gradient(*layer.tensors), autocast_of(layer.x)
    # PyTorch's operations cast for gradients, since autograd records them. Autocast leaves float64 alone.
    if to is not None and (learns or to.itemsize > 2 or layer.x.dtype == torch.float64):
        return None
    cast_layer = layer if to is None else layer.to(to)
    check_layer(cast_layer.squeezed(axis))
    x = cast_layer.x
    masked = layer.lengths is not None or layer.reset is not None
    name = dispatch.choose(
        backend, x.device, x.dtype, cell=layer.cell, projected=False, masked=masked, cells=False, layer=cast_layer
    )
    traits = dispatch.traits(name)
    if not traits.plans or not is_plain(*layer.weights) or 0 in x.shape[: 3 if layer.cell.gates_of_x else -1]:
        return None
    if not traits.plans_sixteen_bits and (x.itemsize == 2 or to is not None):
        return None
    keeps = all(a is None or (type(a) is Parameter and a.is_contiguous()) for a in layer.weights)
    example = cast_layer._replace(weights=layer.weights)  # weights are cast when they are packed
    with torch.inference_mode(False), torch.no_grad():
        plan: Plan = dispatch.module(name).plan(example, learns, kept if keeps else None, (1,) * axis)
    plan.backend, plan.types = name, None
    if learns:
        return partial(_differentiable, plan)
    return plan.forward if to is None else partial(_cast, plan, to)


def _differentiable(plan: Plan, layer: Layer) -> Run:
    found = apply_plan(plan, layer, layer.x, *layer.weights, *layer.states, *layer.inputs)
    return Run(found[0], found[1 : 1 + len(layer.states)], ())  # what else a plan keeps is for its backward pass


def _cast(plan: Plan, dtype: torch.dtype, layer: Layer) -> Run:
    return plan.forward(layer.to(dtype)._replace(weights=layer.weights))  # weights are cast when they are packed


def run(
    layer: Layer,
    *,
    plans: Plans | None,
    backend: str | None = None,
    axis: bool = False,
    cells: bool = False,
    weight_hr: Optional = None,
) -> Run:
    """Run one layer in one direction.

    The run keeps the states but the first, (T, B, H) each, if `cells` is true, and otherwise nothing. Its h is None if
    x is (B, I), since it would equal the first of the last states.

    Args:
        layer: the tensors. For a single step x may also be (B, I).
        plans: the plans of the layer, or None to go without.
        backend: a name of `fastlstm.backends.settings.NAMES`. None takes the default that `use_backend` sets.
        axis: whether the states are (1, B, H), in the layer and in the result.
        cells: whether the states but the first are wanted of all steps.
        weight_hr: (P, H), which projects the hidden state.

    Raises:
        ValueError: for tensors that make no layer, and for an unknown backend.
        RuntimeError: if a backend that was asked for by name cannot run them, with its reason.
    """
    if not torch.compiler.is_compiling():
        if plans is not None and weight_hr is None and not cells:
            plan = plans.get(layer, backend, axis, _plan)
            if plan is not None:
                return plan(layer)
        result = _general(layer.squeezed(axis), plans, backend, cells, weight_hr)
    else:
        layer_3d = layer.squeezed(axis)
        if backend is not None:
            settings.check_name(backend)
        if autocast_of(layer.x) is None:  # checked before entering the graph node, so users see our error
            check_layer(layer_3d, weight_hr)
        options = layer.reverse, layer.cell.key, weight_hr, cells, settings.named(backend)
        result = Run.of(len(layer.states), _in_graph(dual_level_in_graph(), *layer_3d.tensors, *options))
    if axis:  # stack, since unsqueeze gives views, which cannot be detached in place
        return result._replace(last=tuple(torch.stack([a]) for a in result.last))
    return result if layer.x.dim() == 3 else result._replace(h=None)


@allow_in_graph  # opaque to dynamo: traced, it would install about a hundred guards, checked at each call
def _in_graph(dual: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Run `_general` as one node of a graph. `dual`: whether a level of dual numbers is active."""
    *tensors, reverse, key, weight_hr, cells, backend = arguments
    with opened_by_graph(dual):
        found = _general(Layer.of(by_key(key), tensors, reverse), None, backend, cells, weight_hr)
    return found.h, *found.last, *found.kept


def _general(layer: Layer, plans: Plans | None, backend: str | None, cells: bool, weight_hr: Optional) -> Run:
    """Run a call that follows no plan. x is (T, B, I), and states are (B, H)."""
    x = layer.x
    if (to := autocast_of(x)) is not None:
        to = torch.float64 if x.dtype == torch.float64 else to  # autocast leaves float64 alone
        weight_hr = None if weight_hr is None else weight_hr.to(to)
        with no_autocast(x):  # plain PyTorch operations would be cast again
            return run(layer.to(to), plans=plans, backend=backend, cells=cells, weight_hr=weight_hr)
    check_layer(layer, weight_hr)
    if x.shape[0] == 0:
        found = empty_run(layer, weight_hr)
        return found if cells else found._replace(kept=())
    name = dispatch.choose(
        backend,
        x.device,
        x.dtype,
        cell=layer.cell,
        projected=weight_hr is not None,
        masked=layer.lengths is not None or layer.reset is not None,
        cells=cells,
        transformed=under_vmap() or dual_level(),
        traced=not is_plain(),  # without tensors it says whether a tracer is active
        layer=layer,
    )
    if name == "aten":
        return aten.forward(layer, weight_hr)
    if x.itemsize == 2 and not dispatch.traits(name).takes_sixteen_bits:  # computed in float32, stored in 16 bits
        wide_hr = None if weight_hr is None else weight_hr.float()
        wide = run(layer.to(torch.float32), plans=plans, backend=name, cells=cells, weight_hr=wide_hr)
        results = wide.h, *wide.last, *wide.kept
        return Run.of(len(layer.states), narrowed(results, x.dtype, (*layer.tensors, weight_hr)))
    if weight_hr is not None or nests_forward_mode():
        found = reference.forward(layer, True, weight_hr)
        found = found._replace(kept=found.kept[:-1])
    elif torch.jit.is_tracing():
        found = Run.of(len(layer.states), made[layer.cell].layer(*layer.tensors, layer.reverse, cells, name))
    else:
        found = differentiable(layer, cells, name)
    return found if cells else found._replace(kept=())
