"""The plans of a layer: what a call of one signature needs no second look at.

A plan belongs to a *signature*: the shapes, types and settings of a call, and whether gradients are wanted. The first
call of a signature checks everything and keeps a plan, and later calls only run the plan.
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

MOST = 4096  # plans of the whole process: of `numba`, each takes 8 KB, or 17 where a call trains
_UNKNOWN = object()  # marks a signature without an entry: None is the entry of one that can have no plan
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
        x, weights, states, lengths, reset, reverse, cell, inputs, scales, activations, _, _ = layer
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
            settings.invariant(),
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
