"""The plans of a layer: what a call of one signature needs no second look at.

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
from torch.nn import Parameter

from fastlstm.autograd.functions import apply_plan
from fastlstm.autograd.modes import autocast_of, is_plain, wants_gradient
from fastlstm.backends import dispatch, settings
from fastlstm.backends.base import Layer, Plan, Run
from fastlstm.backends.checks import check_layer
from fastlstm.backends.cpu import threads_now
from fastlstm.torch_private import dual_level, rnn_precision, transformed

MOST = 4096  # plans of the whole process: of `numba`, each takes 8 KB, or 17 where a call trains
_UNKNOWN = object()  # marks a signature without an entry: None is the entry of one that can have no plan
Runs = Callable[[Layer], Run]


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
        x, weights, states, lengths, reset, reverse, cell, inputs = layer
        if not is_plain(x, *states, lengths, reset, *inputs) or transformed() or dual_level():
            return None, None
        of_weights: list[Any] = []
        of_states: list[Any] = []
        device, learns = x.device, False
        for a in weights:
            if a is None:
                of_weights.append(a)
            elif (type(a) is Parameter or is_plain(a)) and a.device == device and not a.is_neg():
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
            cell, x.shape, x.stride(), x.dtype, device, reverse, axis,
            tuple([(a.shape, a.stride(), a.dtype, a.device) for a in inputs]) if inputs else None,
            None if lengths is None else lengths.stride(), None if reset is None else reset.stride(),
            autocast_of(x), settings.named(backend), rnn_precision(), threads_now(),
            settings.invariant(),
            *of_weights, learns, *of_states,  # between the two, so that no state is taken for a weight
        )  # fmt: skip
        plan: Any = self.made.get(signature, _UNKNOWN)  # one look: another thread may drop what is there
        return (signature, None) if plan is _UNKNOWN else (None, plan)

    def plan_of(self, layer: Layer, backend: str | None, axis: bool) -> Runs | None:
        """Return the plan of a call, made now if its signature is new, or None if no plan can serve."""
        signature, plan = self.find(layer, backend, axis)
        return plan if signature is None else self.make(signature, layer, backend, axis)

    def make(self, signature: Any, layer: Layer, backend: str | None, axis: bool) -> Runs | None:
        """Make and keep the plan of a plain call. Return it, or None if no plan can serve.

        Raises:
            ValueError: for tensors that make no layer.
            RuntimeError: if a backend that was asked for by name cannot run them.
        """
        plan = self.made[signature] = self._plan(layer, backend, axis)
        _in_order.append((ref(self), signature))
        while len(_in_order) > MOST:
            with suppress(IndexError):  # another thread may be here as well
                owner, oldest = _in_order.popleft()
                if (plans := owner()) is not None:
                    plans.made.pop(oldest, None)
        return plan

    def _plan(self, layer: Layer, backend: str | None, axis: bool) -> Runs | None:
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
            plan: Plan = dispatch.module(name).plan(example, learns, self.kept if keeps else None, (1,) * axis)
        plan.backend, plan.types = name, None
        if learns:
            return partial(_differentiable, plan)
        return plan.forward if to is None else partial(_cast, plan, to)


_in_order: deque[tuple["ref[Plans]", Any]] = deque()  # the signatures of all plans and who holds them, the oldest first


def _differentiable(plan: Plan, layer: Layer) -> Run:
    found = apply_plan(plan, layer, layer.x, *layer.weights, *layer.states, *layer.inputs)
    return Run(found[0], found[1 : 1 + len(layer.states)], ())  # what else a plan keeps is for its backward pass


def _cast(plan: Plan, dtype: torch.dtype, layer: Layer) -> Run:
    return plan.forward(layer.to(dtype)._replace(weights=layer.weights))  # weights are cast when they are packed
