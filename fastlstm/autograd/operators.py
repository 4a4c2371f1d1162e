"""The kernels as ``torch.library`` operators, for compilers, exporters and fake tensors. Eager calls go past them.

``fastlstm::forward`` and ``fastlstm::backward`` run one layer in one direction on the backend that their last argument
names. Their outputs never alias each other or an input. An output that is not wanted has no elements. The operators are
for this package alone and check no arguments: `fastlstm.layers` does.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm.autograd.modes import is_plain, wants_gradient
from fastlstm.backends import dispatch
from fastlstm.backends.base import OPERANDS, Gradients, Layer, Run, flat_input
from fastlstm.cells.library import lstm
from fastlstm.torch_private import dual_level, library_of, outside_graphs

Optional = Tensor | None


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *operands, reverse, save, backend = args
    layer = Layer.of(lstm, operands, reverse)
    run: Run = dispatch.module(backend).forward(layer, save)
    kept = run.kept or (layer.x.new_empty(0), layer.x.new_empty(0))
    return run.h, *run.last, *kept


def _gradients(*args: Any) -> tuple[Optional, ...]:
    *tensors, reverse, needs, backend = args
    dh, dh_n, dc_n, dc, *operands, h, c, gates = tensors
    grads, run = Run(dh, (dh_n, dc_n), (dc,)), Run(h, (None, None), (c, gates))
    found: Gradients = dispatch.module(backend).backward(
        grads, Layer.of(lstm, operands, reverse), run, Gradients.of(lstm, needs)
    )
    return found.flat


def _backward(*args: Any) -> tuple[Tensor, ...]:
    x, needs = args[4], args[-2]
    none = x.new_empty
    return (*(none(0) if g is None or not need else g for g, need in zip(_gradients(*args), needs)),)


LIBRARIES: dict[str, torch.library.Library] = {}


def define(name: str, schema: str, function: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> Any:
    """Define an operator, as `torch.library.custom_op` does, but without its wrappers around every call. These take
    twice as long as the rest of a call.
    """
    library = LIBRARIES[name] = library_of(name)  # a module may be loaded again
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, outside_graphs(function), key)
    return getattr(torch.ops.fastlstm, name).default


_FIVE, _SEVEN = (f"({', '.join(['Tensor'] * count)})" for count in (5, 7))
_INCOMING, _KEPT = "Tensor? dh, Tensor? dh_n, Tensor? dc_n, Tensor? dc", "Tensor h, Tensor c, Tensor gates"
forward_op = define("forward", f"({OPERANDS}, bool reverse, bool save, str backend) -> {_FIVE}", _forward)
backward_op = define(
    "backward", f"({_INCOMING}, {OPERANDS}, {_KEPT}, bool reverse, bool[] needs, str backend) -> {_SEVEN}", _backward
)


@torch.library.register_fake("fastlstm::forward", lib=LIBRARIES["forward"])
def _(*args: Any) -> tuple[Tensor, ...]:
    x, _, weight_hh, *_, save, backend = args
    (T, B), H = x.shape[:2], weight_hh.shape[-1]
    groups = weight_hh.shape[0] if weight_hh.dim() == 3 else None
    saved = dispatch.module(backend).saved_shape(T, B, H, x.dtype, groups)
    kept = ((T, B, H), saved) if save else ((0,), (0,))
    return (*(x.new_empty(shape) for shape in ((T, B, H), (B, H), (B, H), *kept)),)


@torch.library.register_fake("fastlstm::backward", lib=LIBRARIES["backward"])
def _(*args: Any) -> tuple[Tensor, ...]:
    likes, needs = args[4:11], args[-2]
    x = likes[0]
    return (*(x.new_empty(like.shape if need and like is not None else (0,)) for need, like in zip(needs, likes)),)


# Dispatch keys of an ordinary tensor outside any mode. Any mode, transform, tensor subclass or lazy view adds a key.
_PLAIN_KEYS = {
    "CPU", "CUDA", "BackendSelect", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"
}  # fmt: skip


@cache
def _is_plain_key_set(text: str) -> bool:
    """Return whether all keys are plain, in a text such as ``DispatchKeySet(CPU, AutogradCPU)``."""
    keys = re.fullmatch(r"DispatchKeySet\((.*)\)", text)
    return keys is not None and _PLAIN_KEYS.issuperset(keys[1].split(", "))


def _any_tangent(*arguments: Any) -> bool:
    """Return whether one of the arguments has an active tangent. None is active in the forward of a Function."""
    return dual_level() and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None for a in arguments
    )


class _Wrapping(torch.library.Library):
    """Passed to torch as `lib`, so that the autograd kernel which torch makes lands in our library, inside `wrap`."""

    def __init__(self, name: str, wrap: Callable[[Any], Any]) -> None:  # super().__init__ would make a second library
        self.name, self.wrap = name, wrap

    def impl(self, op_name: Any, fn: Any, *args: Any, **options: Any) -> Any:
        return LIBRARIES[self.name].impl(op_name, self.wrap(fn), *args, **options)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register a derivative as `torch.library.register_autograd` does, with two differences.

    Tangents raise. A call that nobody differentiates, such as each in a compiled graph, goes straight to the kernel and
    not through the dispatcher a second time.
    """
    function: Any = _forward if name == "forward" else _backward

    def wrap(by_torch: Any) -> Any:
        def run(keyset: Any, *arguments: Any) -> Any:
            if _any_tangent(*arguments):  # torch would silently drop it
                raise NotImplementedError(
                    f"fastlstm::{name} has no forward mode, since torch lets no operator define one: differentiate the "
                    "module itself, or compile the function that does so"
                )
            if torch.is_grad_enabled() or not _is_plain_key_set(repr(keyset)):
                return by_torch(keyset, *arguments)
            return function(*arguments)

        return outside_graphs(run)

    options: Any = {"setup_context": setup_context, "lib": _Wrapping(name, wrap)}
    torch.library.register_autograd(f"fastlstm::{name}", backward, **options)


def _is_direct(*tensors: Optional) -> bool:
    """Return whether a kernel may be called past the dispatcher, because no derivative would be lost.

    Otherwise the operator is called, which records gradients and raises for tangents.
    """
    return not wants_gradient(*tensors) and is_plain(*tensors) and not _any_tangent(*tensors)


def forward(*args: Any) -> tuple[Tensor, ...]:
    """Return ``h`` (T, B, H), ``h_n`` and ``c_n`` (B, H), ``c`` (T, B, H) and the backend's own gates.

    Args:
        args: the tensors of a `Layer`, reverse, whether c and gates are wanted, and the backend's name. c and gates
            are empty unless they are wanted.
    """
    if _is_direct(*args[:9]):
        return _forward(*args)
    return forward_op(flat_input(args[0]), *args[1:])


def backward(*args: Any) -> tuple[Optional, ...]:
    """Return the gradients of x, the weights and the states. A gradient that is not wanted is None.

    Args:
        args: the gradients of h, h_n, c_n and c, each of which may be None; the tensors of the `Layer`; h, c and gates
            of its run; reverse; seven booleans that say which gradients are wanted; and the backend's name.
    """
    if _is_direct(*args[:16]):
        return _gradients(*args)
    gradients = backward_op(*args[:4], flat_input(args[4]), *args[5:])
    return (*(g if need else None for g, need in zip(gradients, args[-2])),)
