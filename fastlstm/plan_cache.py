"""The plans of a layer, by *signature*: the shapes, types and settings of a call, and whether gradients are wanted. The
first call of a signature checks everything and stores a plan, and later calls only run the plan.
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlstm.autograd.modes import autocast_of, is_plain
from fastlstm.backends import settings
from fastlstm.backends.base import Layer, Run
from fastlstm.backends.cpu import threads_now
from fastlstm.torch_private import dispatch_mode_count, dual_level, recognizer, rnn_precision, transformed

# Plans of the whole process, in which that of a module counts once for each layer and direction: of `numba`, each takes
# 8 KB, or 17 where a call trains.
MAX_PLANS = 4096
_UNKNOWN = object()  # marks a signature without an entry: None is the entry of one that can have no plan
Runs = Callable[[Layer], Run]
Makes = Callable[[Layer, str | None, bool, dict[Any, Any] | None], Runs | None]


class _Known(NamedTuple):
    """The latest call with some shape of x and some settings. For a call like it no signature need be made."""

    recognizes: Callable[..., bool]  # returns whether tensors are like those of the call, see `recognizer`
    cast_type: torch.dtype | None  # that of autocast. Whether it is active `recognizes` sees too.
    plan: Runs | None


class Plans:
    """The plans of one layer and direction, or of all that a module has, and the packed weights that they share. Copies
    and pickles are empty. Without `caches`, weights are packed in each call. Packed copies of what is no Parameter,
    mostly new in each call, are kept only if `caches_tensors`. All `Plans` of a process hold at most MAX_PLANS plans.
    """

    __slots__ = ("__weakref__", "caches_tensors", "known", "packed_weights", "plans")

    def __init__(self, caches: bool = True, caches_tensors: bool = False) -> None:
        self.caches_tensors = caches_tensors
        self.plans: dict[Any, Runs | None] = {}
        self.packed_weights: dict[Any, Any] | None = {} if caches else None
        self.known: dict[Any, _Known] = {}  # by the part of a signature that is cheap to make

    def __reduce__(self) -> tuple[type["Plans"], tuple[bool, bool]]:
        return Plans, (self.packed_weights is not None, self.caches_tensors)

    def find(self, layer: Layer, backend: str | None, has_layer_axis: bool) -> tuple[Any, Runs | None]:
        """Return (signature, None) if the signature is new, (None, plan) if not, (None, None) if no plan can serve.
        `has_layer_axis`: whether the states are (1, B, H), as those of modules are, or (B, H).
        """
        x, weights, states, lengths, reset, reverse, cell, inputs, scales, activations, _, layers, directions = layer
        if type(x) is not Tensor and type(x) is not Parameter:  # as tracers pass, whose shapes may have no hash
            return None, None
        weights += scales
        tensors = [a for a in weights if a is not None]
        present = None if len(tensors) == len(weights) else tuple([a is not None for a in weights])
        tensors.append(x)
        has_states = states[0] is not None
        if has_states:
            tensors += states
        if lengths is not None:
            tensors.append(lengths)
        if reset is not None:
            tensors.append(reset)
        if inputs:
            tensors += inputs
        call = (
            x.shape, present, has_states, lengths is None, reset is None, reverse, has_layer_axis, cell, layers,
            directions, activations, torch.is_grad_enabled(), settings.default if backend is None else backend,
            rnn_precision(), threads_now(),
            settings.invariant(),
        )  # fmt: skip
        if dispatch_mode_count() or dual_level():
            return None, None
        known = self.known.get(call)
        if (
            known is not None
            and known.recognizes(*tensors)
            and 0 not in map(Tensor.data_ptr, tensors)  # without memory, since its storage was resized to nothing
            and (known.cast_type is None or known.cast_type is autocast_of(x))
        ):
            return None, known.plan
        if not is_plain(*tensors) or transformed() or any(a is None for a in tensors):
            return None, None
        cast_type = autocast_of(x)
        forms = [(type(a), a.shape, a.stride(), a.dtype, a.device, a.requires_grad) for a in tensors]
        signature = call, cast_type, *forms
        plan: Any = self.plans.get(signature, _UNKNOWN)  # one look-up, since another thread may remove the entry
        if plan is _UNKNOWN:
            return signature, None
        if len({*map(id, tensors)}) == len(tensors):  # a tensor that occurs twice would not be recognized
            self.known[call] = _Known(recognizer(tensors), cast_type, plan)
            if signature not in self.plans:  # another thread has removed the plan meanwhile
                self.known.pop(call, None)
        return None, plan

    def get(self, layer: Layer, backend: str | None, has_layer_axis: bool, make: Makes) -> Runs | None:
        """Return the plan of a call, or None if no plan can serve. `make` makes a missing one, from the first three
        arguments and the dictionary of packed weights or None, or returns None. Its errors pass.
        """
        signature, plan = self.find(layer, backend, has_layer_axis)
        if signature is None:
            return plan
        types = (Parameter, Tensor) if self.caches_tensors else (Parameter,)
        caches = all(a is None or (type(a) in types and a.is_contiguous()) for a in layer.weights)
        plan = self.plans[signature] = make(layer, backend, has_layer_axis, self.packed_weights if caches else None)
        _in_order.extend([(ref(self), signature)] * layer.parts)
        while len(_in_order) > MAX_PLANS:
            with suppress(IndexError):  # another thread may be here as well
                owner, oldest = _in_order.popleft()
                if (holder := owner()) is not None:
                    holder.plans.pop(oldest, None)
                    holder.known.clear()  # which may hold the plan too
        return plan


_in_order: deque[tuple["ref[Plans]", Any]] = deque()  # the holder and signature of every plan, the oldest first
