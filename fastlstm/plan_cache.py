"""The plans of a layer: a call of a known signature is neither checked nor prepared again.

A plan belongs to a *signature*: the shapes, types and settings of a call, and whether gradients are wanted. The first
call of a signature checks everything and stores a plan, and later calls only run the plan.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import ref

import torch
from torch.nn import Parameter

from fastlstm.autograd.modes import autocast_of, is_plain
from fastlstm.backends import settings
from fastlstm.backends.base import Layer, Run
from fastlstm.backends.cpu import threads_now
from fastlstm.torch_private import dual_level, rnn_precision, transformed

MAX_PLANS = 4096  # plans of the whole process: of `numba`, each takes 8 KB, or 17 where a call trains
_UNKNOWN = object()  # marks a signature without an entry: None is the entry of one that can have no plan
Runs = Callable[[Layer], Run]
Makes = Callable[[Layer, str | None, bool, dict[Any, Any] | None], Runs | None]


class Plans:
    """The plans of one layer and direction, and the packed weights that they share.

    It is empty until the first call. Copies and pickles of it are empty. Without `caches`, weights are packed in each
    call. All `Plans` of a process together hold at most MAX_PLANS plans.
    """

    __slots__ = ("__weakref__", "packed_weights", "plans")

    def __init__(self, caches: bool = True) -> None:
        self.plans: dict[Any, Runs | None] = {}
        self.packed_weights: dict[Any, Any] | None = {} if caches else None

    def __reduce__(self) -> tuple[type["Plans"], tuple[()]]:
        return Plans, ()

    def find(self, layer: Layer, backend: str | None, has_layer_axis: bool) -> tuple[Any, Runs | None]:
        """Return (signature, None) if the signature is new, (None, plan) if not, (None, None) if no plan can serve.

        `has_layer_axis`: whether the states are (1, B, H), as those of modules are, or (B, H).
        """
        x, weights, states, lengths, reset, reverse, cell, inputs, scales, activations, _, _ = layer
        weights += scales
        buffers = weights if activations else ()  # checked together: one by one they would take twice as long
        if not is_plain(x, *states, lengths, reset, *inputs, *buffers) or transformed() or dual_level():
            return None, None
        weight_keys: list[Any] = []
        state_keys: list[Any] = []
        device, wants_gradients = x.device, False
        for a in weights:
            if a is None:
                weight_keys.append(a)
            elif (
                (activations or (a.data_ptr() if type(a) is Parameter else is_plain(a)))
                and a.device == device
                and not a.is_neg()
            ):
                weight_keys.append((type(a), a.shape, a.dtype, a.is_contiguous()))
            else:
                return None, None
        if states[0] is not None:
            for a in states:  # `None in states` would compare tensors by their values
                if a is None or a.device != device:
                    return None, None
                state_keys.append((a.shape, a.dtype, a.is_contiguous()))
        if torch.is_grad_enabled():
            for a in (*weights, x, *states, *inputs):  # faster than any() of so few
                if a is not None and a.requires_grad:
                    wants_gradients = True
                    break
        signature = (
            cell, activations, x.shape, x.stride(), x.dtype, device, reverse, has_layer_axis,
            tuple([(a.shape, a.stride(), a.dtype, a.device) for a in inputs]) if inputs else None,
            None if lengths is None else lengths.stride(), None if reset is None else reset.stride(),
            autocast_of(x), settings.named(backend), rnn_precision(), threads_now(),
            settings.invariant(),
            *weight_keys, wants_gradients, *state_keys,  # between the two, so that no state counts as a weight
        )  # fmt: skip
        plan: Any = self.plans.get(signature, _UNKNOWN)  # one look-up, since another thread may remove the entry
        return (signature, None) if plan is _UNKNOWN else (None, plan)

    def get(self, layer: Layer, backend: str | None, has_layer_axis: bool, make: Makes) -> Runs | None:
        """Return the plan of a call, or None if no plan can serve. A plan that is not there yet is made and stored.

        Args:
            make: is called with the first three arguments and the dictionary of packed weights. It returns the new
                plan, or None if no plan can serve. Its errors pass.
        """
        signature, plan = self.find(layer, backend, has_layer_axis)
        if signature is None:
            return plan
        plan = self.plans[signature] = make(layer, backend, has_layer_axis, self.packed_weights)
        _in_order.append((ref(self), signature))
        while len(_in_order) > MAX_PLANS:
            with suppress(IndexError):  # another thread may be here as well
                owner, oldest = _in_order.popleft()
                if (holder := owner()) is not None:
                    holder.plans.pop(oldest, None)
        return plan


_in_order: deque[tuple["ref[Plans]", Any]] = deque()  # the holder and signature of every plan, the oldest first
