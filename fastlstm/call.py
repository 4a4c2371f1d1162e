"""How a call reaches a backend.

`run_planned` runs all layers and directions of a module in one call. It has a plan if the whole call is plain, as the
table says it, is of float32 or float64 and without `inputs`, and if one backend that plans modules runs all parts.
Otherwise a module calls `run` for one layer after the other, and so it does where a part is more than its cell
(`recompute`, zoneout, recurrent dropout) or where dropout stands between layers.

A module of one step runs it by torch's operator where `aten.runs_step` says so, and comes here for all others.

`run` takes the first row of this table that describes the call. `run` and `Plans.find` ask what is above the line, and
`_run_checked` asks the rest.

| the call                                              | what runs it                                             |
|-------------------------------------------------------|----------------------------------------------------------|
| is traced by `torch.compile`                          | one opaque node of the graph; it runs the lower half     |
| is plain: eager, under no transform, without the      | the plan of its signature, by itself or, where gradients |
| inner states of all steps                             | are wanted, inside `PlannedFunction`                     |
|-------------------------------------------------------|----------------------------------------------------------|
| is plain, once it was cast for autocast               | the plan of its new signature                            |
| has no time steps                                     | nothing: the results are the initial states              |
| is plain, once its 16 bits were cast to float32       | the plan of its new signature                            |
| is for the backend aten                               | torch's own layer                                        |
| is under forward mode                                 | `reference`, whose operations autograd sees one by one   |
| is recorded by `torch.jit.trace`                      | an operator of the cell                                  |
| is any other                                          | `LayerFunction`, or without derivatives the backend      |
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlstm.autograd import rules, step_sums  # noqa: F401  # which defines the operators of every cell
from fastlstm.autograd.elementary import narrowed
from fastlstm.autograd.layer_function import differentiable, run_plan
from fastlstm.autograd.modes import autocast_of, is_plain, no_autocast, under_vmap, wants_gradient
from fastlstm.autograd.operators import by_cell
from fastlstm.backends import aten, dispatch, settings
from fastlstm.backends.base import Layer, Plan, Run, empty_run
from fastlstm.backends.layer_checks import check_layer
from fastlstm.backends.parts import examples
from fastlstm.cells.spec import by_key
from fastlstm.plan_cache import Plans, Runs
from fastlstm.torch_private import allow_in_graph, current_pass, dual_level, dual_level_in_graph, opened_by_graph


def run(
    layer: Layer,
    *,
    plans: Plans | None,
    backend: str | None = None,
    has_layer_axis: bool = False,
    inner_states: bool = False,
) -> Run:
    """Run one layer in one direction, or a stack of layers.

    `saved` of the result has the inner states of all steps, (T, B, H) each, if `inner_states` is true, and is empty
    otherwise. h is None if x is (B, I), since it would equal the first of the last states.

    Args:
        layer: the tensors. For a single step x may also be (B, I).
        plans: the plans of the layer, or None to go without.
        backend: a name of `fastlstm.backends.settings.NAMES`. None takes the default that `use_backend` sets.
        has_layer_axis: whether the states are (1, B, H), in the layer and in the result.
        inner_states: whether the inner states of all steps are wanted.

    Raises:
        ValueError: for tensors that make no layer, and for an unknown backend.
        RuntimeError: if a backend that was asked for by name cannot run them, with its reason.
    """
    if torch.compiler.is_compiling():
        result = _as_node(layer.squeezed(has_layer_axis), backend, inner_states)
    else:
        if plans is None or inner_states:
            plans = None  # a plan returns no inner states
        elif (plan := plans.get(layer, backend, has_layer_axis, _plan)) is not None:
            return plan(layer)
        result = _run_checked(layer.squeezed(has_layer_axis), plans, backend, inner_states)
    if has_layer_axis:  # stack, since unsqueeze gives views, which cannot be detached in place
        return result._replace(last=tuple(torch.stack([a]) for a in result.last))
    return result if layer.x.dim() == 3 else result._replace(h=None)


def run_planned(layer: Layer, plans: Plans, backend: str | None) -> Run | None:
    """Run all layers and directions of a module in one call, or return None where no plan can serve. x is (T, B, I),
    and the states are (parts, B, H). `plans`: the module's. `backend` and errors are those of `run`.
    """
    plan = plans.get(layer, backend, True, _plan)
    return None if plan is None else plan(layer)


def _as_node(layer: Layer, backend: str | None, inner_states: bool) -> Run:
    if backend is not None:
        settings.check_name(backend)
    if autocast_of(layer.x) is None:  # checked before entering the graph node, so users see our error
        check_layer(layer)
    options = layer.stacked, layer.reverse, layer.cell.key, inner_states, settings.named(backend)
    return Run.of(len(layer.states), _in_graph(dual_level_in_graph(), *layer.tensors, *options))


@allow_in_graph  # opaque to dynamo: traced, it would install about a hundred guards, checked at each call
def _in_graph(dual: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """Run a call as one node of a graph. `dual`: whether a level of dual numbers is active."""
    *tensors, stacked, reverse, key, inner_states, backend = arguments
    with opened_by_graph(dual):
        layer = Layer.of(by_key(key), tensors, reverse)._replace(stacked=stacked)
        result = _run_checked(layer, None, backend, inner_states)
    return result.flat


def _run_checked(layer: Layer, plans: Plans | None, backend: str | None, inner_states: bool) -> Run:
    """Check a call, cast its tensors, choose a backend, and run the call: the lower half of the table above."""
    cast_type = autocast_of(layer.x)
    with no_autocast(layer.x):  # plain PyTorch operations would be cast again
        if cast_type is not None:  # autocast leaves float64 alone
            layer = layer.to(torch.float64 if layer.x.dtype == torch.float64 else cast_type)
            if plans is not None and (plan := plans.get(layer, backend, False, _plan)) is not None:
                return plan(layer)
        check_layer(layer)
        if layer.x.shape[0] == 0:
            result = empty_run(layer)
            return result if inner_states else result._replace(saved=())
        name = dispatch.choose(
            backend,
            layer.x.device,
            layer.x.dtype,
            cell=layer.cell,
            masked=layer.lengths is not None or layer.reset is not None,
            inner_states=inner_states,
            transformed=layer.stacked or under_vmap() or dual_level(),
            traced=not is_plain(),  # without tensors it says whether a tracer is active
            layer=layer,
        )
        wide = layer
        if layer.x.itemsize == 2 and not dispatch.traits(name).takes_sixteen_bits:
            wide = layer.to(torch.float32)  # computed in float32, stored in 16 bits
        if wide is not layer and plans is not None and (plan := plans.get(wide, name, False, _plan)) is not None:
            result = plan(wide)
        else:
            result = _run_unplanned(wide, name, inner_states)
        if not inner_states:
            result = result._replace(saved=())
        if wide is layer:
            return result
        results = narrowed(result.flat, layer.x.dtype, layer.tensors)
        return Run.of(len(layer.states), results)


def _run_unplanned(layer: Layer, backend: str, inner_states: bool) -> Run:
    """Run a layer by a backend that can run it: the last four rows of the table above. x is (T, B, I), states are (B,
    H), of types that the backend takes. Without `inner_states` the result may have these all the same.
    """
    if backend == "aten":
        return aten.forward(layer)
    if torch.jit.is_tracing():
        results = by_cell[layer.cell].layer(*layer.tensors, layer.reverse, inner_states, backend)
        return Run.of(len(layer.states), results)
    return differentiable(layer, inner_states, backend)


def _plan(
    layer: Layer, backend: str | None, has_layer_axis: bool, packed_weights: dict[Any, Any] | None
) -> Runs | None:
    """Make the plan of a plain call of floats, see `Plans.get`. Raises what `run` raises."""
    wants_gradients, cast_type = wants_gradient(*layer.tensors), autocast_of(layer.x)
    # PyTorch's operations cast for gradients, since autograd records them. Autocast leaves float64 alone.
    if cast_type is not None and (wants_gradients or cast_type.itemsize > 2 or layer.x.dtype == torch.float64):
        return None
    cast_layer = layer if cast_type is None else layer.to(cast_type)
    x, names = cast_layer.x, set[str]()
    masked = layer.lengths is not None or layer.reset is not None
    for part in examples(cast_layer):
        check_layer(part.squeezed(has_layer_axis))
        names.add(dispatch.choose(
            backend, x.device, x.dtype, cell=layer.cell, masked=masked, inner_states=False,
            transformed=layer.stacked, layer=part,
        ))  # fmt: skip
    name, *others = names
    traits = dispatch.traits(name)
    if layer.parts > 1 and (
        others or not traits.plans_many or cast_type is not None or x.itemsize == 2 or layer.stacked or layer.inputs
    ):
        return None
    if layer.parts > 1 and wants_gradients:  # a lowest layer that wants none is better run by itself, saving nothing
        lowest = layer.weights[: len(layer.weights) // layer.layers]
        if not wants_gradient(x, *lowest, *layer.states):
            return None
    if not traits.plans or not is_plain(*layer.weights) or 0 in x.shape[: 3 if layer.cell.gates_of_x else -1]:
        return None
    if (layer.stacked or not traits.plans_sixteen_bits) and (x.itemsize == 2 or cast_type is not None):
        return None
    if layer.stacked and not traits.plans_many:
        return None
    example = cast_layer._replace(weights=layer.weights)  # weights are cast when they are packed
    with torch.inference_mode(False), torch.no_grad():
        plan: Plan = dispatch.module(name).plan(example, wants_gradients, packed_weights, (1,) * has_layer_axis)
    plan.backend, plan.types, plan.known, plan.loop = name, None, {}, None
    # gradients of other tensors than Parameters go on to what they were made from, which differs from step to step
    are_parameters = all(a is None or type(a) is Parameter for a in layer.weights)
    if plan.accumulates and current_pass is not None and packed_weights is not None and are_parameters:
        forms = tuple([None if a is None else (a.shape, a.dtype, a.requires_grad) for a in layer.weights])
        if wants_gradients and any(form is not None and form[-1] for form in forms):
            plan.loop = packed_weights.setdefault(forms, step_sums.Loop())  # of all plans with such weights
    if wants_gradients:
        return partial(run_plan, plan)
    return plan.forward if cast_type is None else partial(_cast, plan, cast_type)


def _cast(plan: Plan, dtype: torch.dtype, layer: Layer) -> Run:
    return plan.forward(layer.to(dtype)._replace(weights=layer.weights))  # weights are cast when they are packed
