"""A layer without gradients: its weights stay packed from one call to the next."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastlstm import checks, dispatch, ops


class Slot:
    """Where a module keeps the packed weights of one layer and direction. Empty until the layer runs without gradients;
    a copy or a pickle of it is empty.
    """

    __slots__ = ("layer",)

    def __init__(self) -> None:
        self.layer: Any = None

    def __reduce__(self) -> tuple[type["Slot"], tuple[()]]:
        return Slot, ()


class KeepsPacked:
    """A module whose layers keep packed weights: what else such a module needs."""

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop("_slots", None)  # the copy would stay behind on the old device, and hold on to the parameters
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def flatten_parameters(self) -> None:
        """Drop the weights that were packed for inference: they are packed again at the next call without gradients.

        That happens by itself when a weight is replaced, moved or changed in place. What is written past PyTorch,
        through ``.data`` or numpy, is found where it changes a bias, or a row or column of a weight; otherwise call
        this.
        """
        vars(self).pop("_slots", None)


def slot_of(module: Any, index: int = 0) -> Slot | None:
    """The module's slot of layer index // D, direction index % D, made when first asked for; None under a tracer."""
    if torch.compiler.is_compiling():
        return None
    slots: dict[int, Slot] = vars(module).setdefault("_slots", {})
    return slots.get(index) or slots.setdefault(index, Slot())


def infer(
    slot: Slot,
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    reverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``h`` (T, B, H), ``h_n`` and ``c_n`` (B, H), or None where this call is none of a backend that packs weights.

    Weights are packed again when one of them is another tensor, lies elsewhere or was changed in place, and for another
    backend. `x`, `hx` and
    `weights` (weight_ih, weight_hh, bias_ih, bias_hh) are as the module's own checks leave them.
    """
    name = dispatch.packing(backend, x.device, x.dtype)
    if name is None or x.shape[0] == 0 or _transformed() or not ops.is_plain(x):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(a is not None and a.requires_grad for a in weights)):
        return None
    if hx is not None:
        h_0, c_0 = hx
        if not ops.is_plain(h_0, c_0) or (torch.is_grad_enabled() and (h_0.requires_grad or c_0.requires_grad)):
            return None
    if not all(a is None or type(a) is Parameter for a in weights):
        return None  # parametrized, or another's for one call: they would be packed for nothing
    layer = slot.layer
    if layer is None or layer.backend != name or not layer.is_of(weights):
        if not all(a is None or (a.is_contiguous() and not a.is_inference()) for a in weights):
            return None  # inference tensors have no version that would tell of a change
        checks.check_layer(x, hx, *weights, None)
        slot.layer = None  # its memory before the new one's
        slot.layer = layer = dispatch.module(name).pack(weights)
    if x.dtype is not layer.dtype or x.shape[2] != layer.I or (hx is not None and h_0.shape[1] != layer.H):
        return None  # and have it explained
    result = layer.forward(x, hx, reverse)
    if result is None:  # written to past the version counter
        slot.layer = layer = dispatch.module(name).pack(weights)
        result = layer.forward(x, hx, reverse)
    return result


def _transformed() -> bool:
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )
