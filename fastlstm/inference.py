"""Short ways through a module's call: Functions for calls under no transform, and weights that stay packed from one
call to the next, while no gradient is wanted and where a time step is a call.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlstm import checks, dispatch, eager, ops
from fastlstm.backends.cpu import CastWeights, WidenedWeights
from fastlstm.backends.memory import unpooled
from fastlstm.levels import wants_gradient
from fastlstm.torch_private import dual_level, transformed, version


class Slot:
    """Where a module keeps the packed weights of one layer and direction, and those that autocast has cast. Empty until
    they are first used; a copy or a pickle of it is empty.
    """

    __slots__ = ("cast", "layer", "seen")

    def __init__(self) -> None:
        self.layer: Any = None
        # where the weights of the last narrow step lay, and their versions
        self.seen: list[tuple[int, int | None]] | None = None
        self.cast: CastWeights | None = None

    def __reduce__(self) -> tuple[type["Slot"], tuple[()]]:
        return Slot, ()


class KeepsPacked:
    """A module whose layers keep packed weights: what else such a module needs."""

    def __getstate__(self) -> dict[str, Any]:
        of_torch = getattr(super(), "__getstate__", None)  # of RNNBase; Python 3.10's objects have none
        state = dict(vars(self) if of_torch is None else of_torch())
        state.pop("_slots", None)  # a pickle is to name no class but the module's
        return state

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop("_slots", None)  # the copy would stay behind on the old device, and hold on to the parameters
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def flatten_parameters(self) -> None:
        """Drop the weights that were kept packed: they are packed again when next used.

        Nobody needs to call it. Every call looks at all weights, and packs them again where they have changed. It gives
        back memory, and has the name under which `torch.nn.LSTM` lays out its weights.
        """
        vars(self).pop("_slots", None)


def slot_of(module: Any, index: int = 0) -> Slot | None:
    """The module's slot of layer index // D, direction index % D, made when first asked for; None under a tracer."""
    if torch.compiler.is_compiling():
        return None
    slots: dict[int, Slot] = vars(module).setdefault("_slots", {})
    return slots.get(index) or slots.setdefault(index, Slot())


Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def infer(
    slot: Slot,
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Weights,
    reverse: bool,
    backend: str | None,
    mask: Tensor | None = None,
    hides: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``h`` (T, B, H), with zeros at held steps if `hides`, ``h_n`` and ``c_n`` (B, H), or None where a gradient may be
    wanted, and where this call is none of a backend that packs weights.

    `x`, `hx`, `weights` (weight_ih, weight_hh, bias_ih, bias_hh) and `mask` are as the module's own checks leave them.
    """
    if wants_gradient(*weights, x, *(hx or ())):
        return None
    layer = packed_layer(slot, x, hx, weights, backend)
    return None if layer is None else _inferred(slot, layer, x, hx, weights, reverse, mask=mask, hides=hides)


def infer_cast(
    slot: Slot,
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Weights,
    reverse: bool,
    backend: str | None,
    dtype: torch.dtype,
    mask: Tensor | None,
    hides: bool,
) -> tuple[Tensor, ...] | None:
    """As `infer`, under an autocast to `dtype`. Tensors that do not fit are left to be explained."""
    states = hx or ()
    if dtype.itemsize > 2 or wants_gradient(*weights, x, *states) or _under_transform():
        return None
    name = dispatch.packing(backend, x.device, dtype)
    if name is None or x.shape[0] == 0 or not ops.is_plain(x, mask, *states) or not _keepable(weights):
        return None
    if not weights[0].dim() == weights[1].dim() == 2:
        return None
    size, (rows, I) = (x.shape[1], weights[1].shape[1]), weights[0].shape
    shapes = (rows, I), (rows, rows // 4), (rows,), (rows,)
    if x.shape[2] != I or not all(a.shape == size and a.is_cpu for a in states):
        return None
    for a, other in zip(weights, shapes):
        if a is not None and not (a.shape == other and a.is_cpu and a.dtype is weights[0].dtype):
            return None
    for _ in range(2):  # once more, if they were written to past the version counter
        layer = slot.cast
        if layer is None or layer.takes != dtype or layer.backend != name or not layer.is_of(weights):
            slot.cast = None  # its memory before the new one's
            with torch.inference_mode(False):
                layer = CastWeights(weights, dtype, partial(_pack, name))
            layer.backend = name
            slot.cast = layer  # complete: another thread may look at it
        if (result := layer.forward(x, hx, reverse, mask=mask, hides=hides)) is not None:
            break
    return result


def infer_both(
    slots: Sequence[Slot | None],
    x: Tensor,
    hx: Sequence[tuple[Tensor, Tensor] | None],
    weights: Sequence[Weights],
    backend: str | None,
    mask: Tensor | None,
    hides: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]] | None:
    """As `infer`, both directions of a layer: their outputs side by side, (T, B, 2H), and each one's states."""
    layers = []
    for slot, states, each in zip(slots, hx, weights):
        if slot is None or wants_gradient(*each, x, *(states or ())):
            return None
        layer = packed_layer(slot, x, states, each, backend)
        if layer is None or not layer.side_by_side:
            return None
        layers.append(layer)
    (T, B, _), H = x.shape, layers[0].H
    joined, ends = unpooled(x, T, B, 2 * H), []
    for k, out in enumerate(joined.split(H, -1)):
        options: Any = {"mask": mask, "hides": hides, "out": out}
        result = _inferred(slots[k], layers[k], x, hx[k], weights[k], k == 1, **options)
        if result is None:  # somebody is writing to the weights
            return None
        ends.append(result[1:])
    return joined, ends


def _inferred(
    slot: Any, layer: Any, x: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Weights, reverse: bool, **options: Any
) -> Any:
    result = layer.forward(x, hx, reverse, **options)
    if result is None:  # written to past the version counter
        slot.layer = layer = _pack(layer.backend, weights)
        result = layer.forward(x, hx, reverse, **options)
    return result


def packed_step(slot: Slot, x: Any, hx: Any, weights: Weights, backend: str | None) -> tuple[Tensor, Tensor] | None:
    """h and c (B, H) after one step from `x` (B, I) and states (B, H), with gradients or without, where all is as it
    was at a call before this one, whatever a caller may have given; None where it is not, for `lstm` to find out why.
    """
    layer = slot.layer
    if layer is None or type(hx) is not tuple or len(hx) != 2:
        return None
    h_0, c_0 = hx
    if x is None or h_0 is None or c_0 is None or not ops.is_plain(x, h_0, c_0):
        return None
    if torch.is_autocast_enabled("cpu"):  # which casts what a cell is given to its weights' type
        return None
    shape = x.shape
    if len(shape) != 2 or not h_0.shape == c_0.shape == (shape[0], layer.H) or not _serves(layer, weights, backend, x):
        return None
    if not (h_0.is_cpu and c_0.is_cpu and h_0.dtype is c_0.dtype is layer.dtype):
        return None
    if not wants_gradient(*weights, x, h_0, c_0):
        return layer.step(x, h_0, c_0)
    return eager.step(x, *weights, h_0, c_0, layer) if layer.steps_back and shape[0] else None


def plain_sequence(
    slot: Slot, x: Any, hx: Any, weights: Weights, backend: str | None, batch_first: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """As `packed_step`, for a whole sequence and a module of one layer and direction: `x` (T, B, I) and states
    (1, B, H) or None to what the module returns, or None.
    """
    states: tuple[Any, ...] = ()
    if hx is not None:
        if type(hx) is not tuple or len(hx) != 2:
            return None
        states = hx
    if x is None or any(a is None for a in states) or not ops.is_plain(x, *states):
        return None
    shape, H = x.shape, weights[1].shape[-1]
    if len(shape) != 3 or shape[0] == 0 or shape[1] == 0:
        return None
    if states:
        size = 1, shape[0 if batch_first else 1], H
        if not all(a.shape == size and a.is_cpu and a.dtype is x.dtype for a in states):
            return None
    if wants_gradient(*weights, x, *states):
        result = train(slot, x.transpose(0, 1) if batch_first else x, states, weights, backend, layer_axis=True)
    else:
        layer: Any = slot.cast if torch.is_autocast_enabled("cpu") else slot.layer
        if layer is None or not _serves(layer, weights, backend, x):
            return None
        hx = (states[0][0], states[1][0]) if states else None
        result = layer.forward(x.transpose(0, 1) if batch_first else x, hx, False, layer_axis=True)
    if result is None:
        return None
    h, h_n, c_n = result
    return h.transpose(0, 1) if batch_first else h, (h_n, c_n)


def train(
    slot: Slot | None,
    x: Tensor,
    states: tuple[Any, ...],
    weights: Weights,
    backend: str | None,
    *,
    mask: Tensor | None = None,
    hides: bool = False,
    reverse: bool = False,
    layer_axis: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``h``, ``h_n`` and ``c_n`` of `LSTMSequence` from plain tensors and states, or none of these; None where it does
    not take what it would be given.
    """
    name = dispatch.packing(backend, x.device, x.dtype)
    if name is None or not dispatch.traits(name).takes_biases_apart or _transformed():
        return None
    rows = weights[0].shape[0]
    shapes = (rows, x.shape[2]), (rows, rows // 4), (rows,), (rows,)
    for a, shape in zip(weights, shapes):
        if a is None:
            continue
        if not (a.shape == shape and a.dtype is x.dtype and a.is_cpu) or not (type(a) is Parameter or ops.is_plain(a)):
            return None
    packed = None
    h_0, c_0 = states or (None, None)
    if slot is not None and x.shape[0] == 1 and mask is None and dispatch.keeps_steps(name, x.dtype):  # one of many
        settled = x.itemsize > 2 or (_keepable(weights) and _is_settled(slot, weights))
        hx = None if h_0 is None else (h_0[0], c_0[0]) if layer_axis else (h_0, c_0)
        packed = packed_layer(slot, x, hx, weights, backend) if settled else None
    return eager.sequence(x, *weights, h_0, c_0, mask, reverse, hides, layer_axis, name, packed)[:3]


def _is_settled(slot: Slot, weights: Weights) -> bool:
    """Whether these weights are packed, or the step before had them. To widen and pack those of 16 bits takes longer
    than a step without, for nothing where each step is followed by an update.
    """
    now, layer, settled = [(a.data_ptr(), version(a)) for a in weights if a is not None], slot.layer, False
    if layer is not None and layer.stale:  # an update that is not counted: it is as if this were the first step
        slot.layer = layer = None
    else:
        settled = slot.seen == now
    slot.seen = now
    return settled or (layer is not None and layer.is_of(weights))


_CAST = (torch.float32, torch.bfloat16, torch.float16)  # by autocast


def _serves(layer: Any, weights: Weights, backend: str | None, x: Tensor) -> bool:
    """Whether the packed `layer` is of these weights, and what a call with `x` would take."""
    dtype = x.dtype
    if dtype in _CAST and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if not (x.is_cpu and x.shape[-1] == layer.I and dtype is layer.takes) or _under_transform():
        return False
    asked = dispatch.asked(backend)
    if layer.asked != asked:
        if dispatch.packing(backend, x.device, dtype) != layer.backend:
            return False
        if dispatch.asked(backend) == asked:  # and no other thread has changed it meanwhile
            layer.asked = asked
    return bool(layer.is_of(weights))


def packed_layer(slot: Slot, x: Tensor, hx: tuple[Tensor, Tensor] | None, weights: Weights, backend: str | None) -> Any:
    """The slot's packed weights for this call, or None where it is none of a backend that packs weights.

    Weights are packed again when one of them is another tensor, lies elsewhere or was changed in place, and for another
    backend.
    """
    name = dispatch.packing(backend, x.device, x.dtype)
    if name is None or x.shape[0] == 0 or _transformed() or not ops.is_plain(x, *(() if hx is None else hx)):
        return None
    if not all(a is None or type(a) is Parameter for a in weights):
        return None  # parametrized, or another's for one call: they would be packed for nothing
    layer = slot.layer
    if layer is None or layer.backend != name or not layer.is_of(weights):
        if not _keepable(weights):
            return None
        checks.check_layer(x, hx, *weights, None)
        slot.layer = None  # its memory before the new one's
        slot.layer = layer = _pack(name, weights)
    if x.dtype is not layer.dtype or x.shape[2] != layer.I or (hx is not None and hx[0].shape[1] != layer.H):
        return None  # and have it explained
    return layer


def _keepable(weights: Weights) -> bool:
    """Parameters, as a layer has them from call to call. An inference tensor has no version that tells of a change."""
    return all(a is None or (type(a) is Parameter and a.is_contiguous() and not a.is_inference()) for a in weights)


def _pack(
    name: str, weights: Weights, originals: Sequence[Tensor | None] = (), snapshot: Sequence[Tensor | None] = ()
) -> Any:
    module, wide = dispatch.module(name), weights[0].dtype in (torch.float32, torch.float64)
    with torch.inference_mode(False):  # copies made in it have no version
        takes = dispatch.traits(name).takes_bfloat16
        layer = module.pack(weights) if wide else WidenedWeights(weights, module.pack, takes, originals, snapshot)
    layer.backend = name
    return layer


def _transformed() -> bool:
    return _under_transform() or torch.is_autocast_enabled("cpu")


def _under_transform() -> bool:
    return transformed() or dual_level()
