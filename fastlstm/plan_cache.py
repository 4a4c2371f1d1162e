"""The plans of a layer: a call of a known signature is neither checked nor prepared again.

A plan belongs to a *signature*: the shapes, types and settings of a call, and whether gradients are wanted. The first
call of a signature checks everything and stores a plan, and later calls only run the plan.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import ref

import torch

from fastlstm.autograd.modes import autocast_of, is_plain
from fastlstm.backends import settings
from fastlstm.backends.base import Layer, Run
from fastlstm.backends.cpu import threads_now
from fastlstm.torch_private import dual_level, recognizer, rnn_precision, transformed

# Plans of the whole process, in which that of a module counts once for each layer and direction: of `numba`, each takes
# 8 KB, or 17 where a call trains.
MAX_PLANS = 4096
_UNKNOWN = object()  # marks a signature without an entry: None is the entry of one that can have no plan
Runs = Callable[[Layer], Run]
Makes = Callable[[Layer, str | None, bool, dict[Any, Any] | None], Runs | None]


class _Weights(NamedTuple):
    """The weights of a module's last call, by which those of the next are recognized.

    Attributes:
        present: which there are: the number of weights if none is None, or for each whether it is a tensor.
        recognizes: returns whether tensors are like these, see `torch_private.recognizer`.
        form: what stands for their types and shapes in a signature.
        wants_gradients: whether any of them requires a gradient.
    """

    present: int | list[bool]
    recognizes: Callable[..., bool]
    form: object
    wants_gradients: bool


class Plans:
    """The plans of one layer and direction, or of all that a module has, and the packed weights that they share.

    It is empty until the first call. Copies and pickles of it are empty. Without `caches`, weights are packed in each
    call. All `Plans` of a process together hold at most MAX_PLANS plans.
    """

    __slots__ = ("__weakref__", "forms", "last", "packed_weights", "plans")

    def __init__(self, caches: bool = True) -> None:
        self.plans: dict[Any, Runs | None] = {}
        self.packed_weights: dict[Any, Any] | None = {} if caches else None
        self.forms: dict[Any, object] = {}  # what stands for the types and shapes of all weights
        self.last: _Weights | None = None

    def __reduce__(self) -> tuple[type["Plans"], tuple[()]]:
        return Plans, ()

    def find(self, layer: Layer, backend: str | None, has_layer_axis: bool) -> tuple[Any, Runs | None]:
        """Return (signature, None) if the signature is new, (None, plan) if not, (None, None) if no plan can serve.

        `has_layer_axis`: whether the states are (1, B, H), as those of modules are, or (B, H).
        """
        x, weights, states, lengths, reset, reverse, cell, inputs, scales, activations, _, _, layers, directions = layer
        weights += scales
        if not is_plain(x, *states, lengths, reset, *inputs) or transformed() or dual_level():
            return None, None
        last, there = self.last, [a for a in weights if a is not None]
        present = len(weights) if len(there) == len(weights) else [a is not None for a in weights]
        # a parameter without memory, whose storage was resized to nothing, is otherwise as it was
        if last is None or last.present != present or not last.recognizes(*there) or 0 in [a.data_ptr() for a in there]:
            if not is_plain(*there):
                return None, None
            forms = [(type(a), a.shape, a.dtype, a.is_contiguous(), a.device, a.requires_grad) for a in there]
            form: Any = *forms, str(present)
            wants_gradients = any(a.requires_grad for a in there)
            if self.packed_weights is not None:  # of one module, whose weights are mostly as in its last call
                form = self.forms.setdefault(form, object())  # which is compared faster
                if len(set(map(id, there))) == len(there):  # tied weights would not be recognized
                    self.last = _Weights(present, recognizer(there), form, wants_gradients)
        else:
            form, wants_gradients = last.form, last.wants_gradients
        state_keys: list[Any] = []
        device = x.device
        if states[0] is not None:
            for a in states:  # `None in states` would compare tensors by their values
                if a is None or a.device != device:
                    return None, None
                state_keys.append((a.shape, a.dtype, a.is_contiguous()))
        if not torch.is_grad_enabled():
            wants_gradients = False
        elif not wants_gradients:
            for a in (x, *states, *inputs):  # faster than any() of so few
                if a is not None and a.requires_grad:
                    wants_gradients = True
                    break
        signature = (
            cell, activations, x.shape, x.stride(), x.dtype, device, reverse, has_layer_axis, layers, directions,
            tuple([(a.shape, a.stride(), a.dtype, a.device) for a in inputs]) if inputs else None,
            None if lengths is None else lengths.stride(), None if reset is None else reset.stride(),
            autocast_of(x), settings.named(backend), rnn_precision(), threads_now(),
            settings.invariant(),
            form, wants_gradients, wants_gradients and x.requires_grad, *state_keys,
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
        _in_order.extend([(ref(self), signature)] * layer.parts)
        while len(_in_order) > MAX_PLANS:
            with suppress(IndexError):  # another thread may be here as well
                owner, oldest = _in_order.popleft()
                if (holder := owner()) is not None:
                    holder.plans.pop(oldest, None)
        return plan


_in_order: deque[tuple["ref[Plans]", Any]] = deque()  # the holder and signature of every plan, the oldest first
