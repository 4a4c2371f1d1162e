"""The kernels as ``torch.library`` operators: what compilers, exporters and fake tensors see. Eager calls go past them.

``fastlstm::forward`` and ``fastlstm::backward`` run one layer in one direction on the backend named in their last
argument. Their outputs never alias each other or an input; what is not wanted comes back with no elements. They are the
package's own: arguments are checked in `fastlstm.layers`, not here.
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
from fastlstm.torch_private import dual_level, library_of, outside_graphs

Optional = Tensor | None


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *operands, reverse, save, backend = args
    layer = Layer.of(operands, reverse)
    run: Run = dispatch.module(backend).forward(layer, save)
    kept = run.kept or (layer.x.new_empty(0), layer.x.new_empty(0))
    return run.h, *run.last, *kept


def _gradients(*args: Any) -> tuple[Optional, ...]:
    *tensors, reverse, needs, backend = args
    dh, dh_n, dc_n, dc, *operands, h, c, gates = tensors
    grads, run = Run(dh, (dh_n, dc_n), (dc,)), Run(h, (None, None), (c, gates))
    found: Gradients = dispatch.module(backend).backward(grads, Layer.of(operands, reverse), run, Gradients.of(needs))
    return found.flat


def _backward(*args: Any) -> tuple[Tensor, ...]:
    x, needs = args[4], args[-2]
    none = x.new_empty
    return (*(none(0) if g is None or not need else g for g, need in zip(_gradients(*args), needs)),)


LIBRARIES: dict[str, torch.library.Library] = {}


def define(name: str, schema: str, function: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> Any:
    """What `torch.library.custom_op` does, whose wrappers around every call take twice as long as all else here."""
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


# What memory of one's own and an autocast that is past have; any mode, transform, wrapper and view of values has more
_PLAIN_KEYS = {
    "CPU", "CUDA", "BackendSelect", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"
}  # fmt: skip


@cache
def _is_plain_key_set(text: str) -> bool:
    """By what torch prints for a set of dispatch keys, as ``DispatchKeySet(CPU, AutogradCPU)``."""
    keys = re.fullmatch(r"DispatchKeySet\((.*)\)", text)
    return keys is not None and _PLAIN_KEYS.issuperset(keys[1].split(", "))


def _any_tangent(*arguments: Any) -> bool:
    """Whether one of these has a tangent that counts. In a Function's forward none does: its `jvp` has them."""
    return dual_level() and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None for a in arguments
    )


class _Wrapping(torch.library.Library):
    """A library for torch to leave its rule of a derivative in: an operator's own, with `wrap` around the rule."""

    def __init__(self, name: str, wrap: Callable[[Any], Any]) -> None:  # and none of torch's, which would be a second
        self.name, self.wrap = name, wrap

    def impl(self, op_name: Any, fn: Any, *args: Any, **options: Any) -> Any:
        return LIBRARIES[self.name].impl(op_name, self.wrap(fn), *args, **options)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """As `torch.library.register_autograd`; but tangents are refused, and a call that nobody differentiates, as all of
    a compiled graph are, goes to the kernel from here, without a second way through the dispatcher.
    """
    function: Any = _forward if name == "forward" else _backward

    def wrap(by_torch: Any) -> Any:
        def run(keyset: Any, *arguments: Any) -> Any:
            if _any_tangent(*arguments):  # torch would leave it out, without a word
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
    """True where a kernel is called past the dispatcher: not where a derivative may be lost, of a gradient, which
    operators have, or a tangent, which they refuse.
    """
    return not wants_gradient(*tensors) and is_plain(*tensors) and not _any_tangent(*tensors)


def forward(*args: Any) -> tuple[Tensor, ...]:
    """``h`` (T, B, H), ``h_n`` and ``c_n`` (B, H), ``c`` (T, B, H) and the backend's own gates; the last two are empty
    unless asked for.

    Args:
        args: the tensors of a `Layer`, reverse, whether c and gates are wanted, and the backend's name.
    """
    if _is_direct(*args[:9]):
        return _forward(*args)
    return forward_op(flat_input(args[0]), *args[1:])


def backward(*args: Any) -> tuple[Optional, ...]:
    """The gradients of x, the weights and the states, None where they are not wanted.

    Args:
        args: the gradients of h, h_n, c_n and c, each of which may be None; the tensors of the `Layer`; h, c and gates
            of its run; reverse, which gradients are wanted as seven booleans, and the backend's name.
    """
    if _is_direct(*args[:16]):
        return _gradients(*args)
    gradients = backward_op(*args[:4], flat_input(args[4]), *args[5:])
    return (*(g if need else None for g, need in zip(gradients, args[-2])),)
