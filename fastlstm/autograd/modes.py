"""What is going on around a call: gradients, transforms, tracers, and tensors without memory of their own."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastlstm import torch_private as private
from fastlstm.torch_private import dual_level, transformed, watched

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """True where every tensor has memory of its own, so that a kernel can be called past torch's dispatcher."""
    if torch.compiler.is_compiling() or watched() or torch.jit.is_tracing():
        return False
    try:
        for tensor in tensors:
            if tensor is not None:
                if type(tensor) not in _PLAIN or tensor.is_neg():  # the memory of a negated view has other values
                    return False
                # a batched or functional tensor raises; a meta tensor, or one of torch's zeros without memory, has 0
                if not tensor.data_ptr() and (tensor.numel() or tensor.is_meta):
                    return False
    except RuntimeError:
        return False
    return True


def is_untransformed(*tensors: Tensor | None) -> bool:
    """True where a Function that knows no transform may take these tensors: nothing but reverse mode is active."""
    if not is_plain(*tensors):  # first: a compiler ends here
        return False
    return not (transformed() or dual_level())


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)


def wants_autograd(*tensors: Tensor | None) -> bool:
    """True where the call must leave a trace for a derivative of any kind, or runs under a transform."""
    if wants_gradient(*tensors) or dual_level():
        return True
    if not transformed():
        return False
    # a batched tensor does not tell whether what it holds requires a gradient
    return torch.is_grad_enabled() or not private.KNOWS_LEVELS or any(kind != private.Kind.Vmap for kind in _kinds())


def _kinds() -> list[Any]:
    """The transforms that are active, one inside the other."""
    return [level.key() for level in private.all_levels() or ()]


def under_vmap() -> bool:
    """Also under any other transform, where torch does not tell which it is."""
    return transformed() and (not private.KNOWS_LEVELS or private.Kind.Vmap in _kinds())


def nests_forward_mode() -> bool:
    """Over more than one forward-mode level, any Function's derivative is silently zero. Also true over one, where
    torch does not tell how many there are.
    """
    if not (transformed() and dual_level()):
        return False
    return not private.KNOWS_LEVELS or _kinds().count(private.Kind.Jvp) > 1


def differentiated() -> bool:
    """Whether what a backward pass computes is differentiated itself, in either mode."""
    return torch.is_grad_enabled() or dual_level()


def autocast_of(x: Tensor) -> torch.dtype | None:
    """The type to which autocast casts on the device of `x`, or None where there is no autocast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast. Where there is none anyway, it costs nothing: a real one takes 10 microseconds."""
    return nullcontext() if autocast_of(x) is None else torch.autocast(x.device.type, enabled=False)
