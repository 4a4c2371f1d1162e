"""The kernels as ``torch.library`` operators: what compilers, exporters and fake tensors see. Eager calls go past them.

``fastlstm::forward`` and ``fastlstm::backward`` run one layer in one direction on the backend named in their last
argument. Their outputs never alias each other or an input; what is not wanted comes back with no elements. They are the
package's own: arguments are checked in `fastlstm.functional`, not here.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlstm import dispatch
from fastlstm.torch_private import dual_level, library_of, outside_graphs, transformed, watched

_PLAIN = (Tensor, torch.nn.Parameter)


def sum_of_biases(bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    return bias_hh if bias_ih is None else bias_ih if bias_hh is None else bias_ih + bias_hh


def states_of(h_0: Tensor | None, c_0: Tensor | None, x: Tensor, weight_hh: Tensor) -> tuple[Tensor, Tensor]:
    """These two, or where there are none zeros, one row for all; with projection they differ in width."""
    if h_0 is not None and c_0 is not None:
        return h_0, c_0
    rows, (H4, P) = x.shape[1], weight_hh.shape[-2:]
    zeros = x.new_zeros(1, P).expand(rows, -1)
    return zeros, zeros if H4 == 4 * P else x.new_zeros(1, H4 // 4).expand(rows, -1)


def _flat(x: Tensor) -> Tensor:
    """(T, B, I) of what a stack's groups may have on an axis of their own, (T, G, B / G, I)."""
    return x.flatten(1, 2) if x.dim() == 4 else x


def _forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    forward = dispatch.module(backend).forward
    if dispatch.traits(backend).takes_biases_apart:
        return forward(x, weight_ih, weight_hh, bias_ih, h_0, c_0, mask, reverse, save, bias_hh=bias_hh)
    x = _flat(x)
    h_0, c_0 = states_of(h_0, c_0, x, weight_hh)
    return forward(x, weight_ih, weight_hh, sum_of_biases(bias_ih, bias_hh), h_0, c_0, mask, reverse, save)


def _backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    mask: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    reverse: bool,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (dh, dh_n, dc_n, dc, x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask, h, c, gates)
    found = _gradients(tensors, reverse, needs, backend)
    gradients = (g if g is not None and need else x.new_empty(0) for g, need in zip(found, needs))
    dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0 = gradients
    return dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0


def _gradients(
    tensors: tuple[Any, ...], reverse: bool, needs: list[bool], backend: str, *packed: Any
) -> tuple[Tensor | None, ...]:
    *incoming, x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask, h, c, gates = tensors
    bias = bias_ih if bias_hh is None else bias_hh
    if not dispatch.traits(backend).takes_biases_apart:
        x = _flat(x)
        h_0, c_0 = states_of(h_0, c_0, x, weight_hh)
    layer = x, weight_ih, weight_hh, bias, h_0, c_0, mask
    return dispatch.module(backend).backward(*incoming, *layer, h, c, gates, reverse, needs, *packed)


LIBRARIES: dict[str, torch.library.Library] = {}


def define(name: str, function: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> Any:
    """What `torch.library.custom_op` does, whose wrappers around every call take twice as long as all else here."""
    library = LIBRARIES[name] = library_of(name)  # a module may be loaded again
    schema = torch.library.infer_schema(function, mutates_args=())
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, outside_graphs(function), key)
    return getattr(torch.ops.fastlstm, name).default


forward_op, backward_op = define("forward", _forward), define("backward", _backward)


@torch.library.register_fake("fastlstm::forward", lib=LIBRARIES["forward"])
def _(x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask, reverse, save, backend):
    (T, B), H = x.shape[:2], weight_hh.shape[-1]
    groups = weight_hh.shape[0] if weight_hh.dim() == 3 else None
    saved = dispatch.module(backend).saved_shape(T, B, H, x.dtype, groups)
    return (
        x.new_empty(T, B, H),
        x.new_empty(B, H),
        x.new_empty(B, H),
        x.new_empty((T, B, H) if save else (0,)),
        x.new_empty(saved if save else (0,)),
    )


@torch.library.register_fake("fastlstm::backward", lib=LIBRARIES["backward"])
def _(
    dh, dh_n, dc_n, dc, x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask, h, c, gates, reverse, needs, backend
):
    likes = (x, weight_ih, weight_hh, bias_ih if bias_hh is None else bias_hh, h_0, c_0)
    return (*(x.new_empty(like.shape if need and like is not None else (0,)) for need, like in zip(needs, likes)),)


def is_plain(*tensors: Tensor | None) -> bool:
    """True where every tensor has memory of its own, so that a kernel can be called past the dispatcher."""
    if torch.compiler.is_compiling() or watched() or torch.jit.is_tracing():
        return False
    try:
        for tensor in tensors:
            if tensor is not None:
                if type(tensor) not in _PLAIN or tensor.is_meta:
                    return False
                if tensor.is_neg():  # its memory does not hold its values
                    return False
                # a batched or functional tensor raises, one of torch's zeros without memory has 0
                if tensor.data_ptr() == 0 and tensor.numel():
                    return False
    except RuntimeError:
        return False
    return True


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


def is_untransformed(*tensors: Tensor | None) -> bool:
    """True where a Function that knows no transform may take these tensors: nothing but reverse mode is active."""
    if not is_plain(*tensors):  # first: a compiler ends here
        return False
    return not (transformed() or dual_level())


def _is_direct(*tensors: Tensor | None) -> bool:
    """True where a kernel is called past the dispatcher: not where a derivative may be lost, of a gradient, which
    operators have, or a tangent, which they refuse.
    """
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors):
        return False
    return is_plain(*tensors) and not _any_tangent(*tensors)


def forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``h`` (T,B,H), ``h_n``, ``c_n`` (B,H), ``c`` (T,B,H) and the backend's own ``gates``;
    the last two empty unless `save`. States are None for zeros. ``x`` may be (T,G,B/G,I) for a stack of G layers.
    """
    tensors = (weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask)
    if _is_direct(x, *tensors):
        return _forward(x, *tensors, reverse, save, backend)
    return forward_op(_flat(x), *tensors, reverse, save, backend)


def backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    mask: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    reverse: bool,
    needs: list[bool],
    backend: str,
    packed: Any = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight_ih, weight_hh, either bias, h_0 and c_0, each None unless its place in `needs` is true.
    `packed`: these weights as the backend's own `pack` left them.
    """
    tensors = (dh, dh_n, dc_n, dc, x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask, h, c, gates)
    if _is_direct(*tensors):
        ready = () if packed is None else (packed,)
        gradients = _gradients(tensors, reverse, needs, backend, *ready)
    else:
        gradients = backward_op(*tensors[:4], _flat(x), *tensors[5:], reverse, needs, backend)
    return (*(g if need else None for g, need in zip(gradients, needs)),)
