"""The state around a call: whether gradients, transforms or tracers are active, and whether tensors have memory."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastlstm import torch_private as private
from fastlstm.torch_private import dispatch_mode_count, dual_level, transformed

_PLAIN = (Tensor, torch.nn.Parameter)
_EMPTY = nullcontext()


def is_plain(*tensors: Tensor | None) -> bool:
    """Return whether nothing traces and every tensor has memory of its own. A kernel may then be called directly."""
    if torch.compiler.is_compiling() or dispatch_mode_count() or torch.jit.is_tracing():
        return False
    try:
        for tensor in tensors:
            if tensor is not None:
                if type(tensor) not in _PLAIN or tensor.is_neg():  # the memory of a negated view holds other values
                    return False
                # a batched or functional tensor raises; a meta tensor, or one of torch's zeros without memory, has 0
                if not tensor.data_ptr() and (tensor.numel() or tensor.is_meta):
                    return False
    except RuntimeError:
        return False
    return True


def has_memory(tensor: Tensor) -> bool:
    """Return False for a tensor whose storage was resized to nothing; True for what a transform or a tracer holds."""
    if type(tensor) not in _PLAIN or not is_plain() or transformed():
        return True
    # a meta tensor, or one of torch's zeros without memory, has the storage that it would need
    return bool(tensor.data_ptr()) or tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def is_untransformed(*tensors: Tensor | None) -> bool:
    """Return whether only ordinary reverse mode is active, so that a Function needs no rule of a transform."""
    if not is_plain(*tensors):  # first: under a compiler it returns False, before calls that cannot be traced
        return False
    return not (transformed() or dual_level())


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors)


def wants_autograd(*tensors: Tensor | None) -> bool:
    """Return whether a derivative of any kind may be taken of the call."""
    if wants_gradient(*tensors) or dual_level():
        return True
    if not transformed():
        return False
    # a batched tensor does not tell whether the tensor inside requires a gradient
    return torch.is_grad_enabled() or not private.KNOWS_LEVELS or any(kind != private.Kind.Vmap for kind in _kinds())


def _kinds() -> list[Any]:
    """Return the kinds of all active transforms."""
    return [level.key() for level in private.all_levels() or ()]


def under_vmap() -> bool:
    """Return whether `vmap` is active. If torch does not tell which transforms are active, any of them counts."""
    return transformed() and (not private.KNOWS_LEVELS or private.Kind.Vmap in _kinds())


def has_saved_tensor_hooks() -> bool:
    """Return whether hooks of saved tensors are active, such as those of `save_on_cpu`."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("a question alone"):  # raises where some are active
            return False
    except RuntimeError:
        return True


def autocast_of(x: Tensor) -> torch.dtype | None:
    """Return the type to which autocast casts on the device of `x`, or None without autocast."""
    device = "cpu" if x.is_cpu else x.device.type  # the first is asked faster
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast. If none is active it is empty, which saves 10 microseconds."""
    return _EMPTY if autocast_of(x) is None else torch.autocast(x.device.type, enabled=False)
