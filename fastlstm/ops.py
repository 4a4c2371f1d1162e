"""The kernels as ``torch.library`` operators: what compilers, exporters and fake tensors see. Eager calls go past them.

``fastlstm::forward`` and ``fastlstm::backward`` run one layer in one direction on the backend named in their last
argument. Their outputs never alias each other or an input; what is not wanted comes back with no elements. They are the
package's own: arguments are checked in `fastlstm.functional`, not here.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch._library.custom_ops import get_library_allowing_overwrite
from torch._VF import _unpack_dual as unpack_dual
from torch.autograd import forward_ad

from fastlstm import dispatch

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


def define(name: str, function: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> torch._ops.OpOverload:
    """What `torch.library.custom_op` does, whose wrappers around every call take twice as long as all else here."""
    library = LIBRARIES[name] = get_library_allowing_overwrite("fastlstm", name)  # a module may be loaded again
    schema = torch.library.infer_schema(function, mutates_args=())
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, torch._disable_dynamo(function), key)
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
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    try:
        for tensor in tensors:
            if tensor is not None:
                if type(tensor) not in _PLAIN or tensor.is_meta:
                    return False
                if tensor.is_neg() or tensor._is_zerotensor():  # its memory does not hold its values
                    return False
                tensor.data_ptr()  # a batched or functional tensor has none
    except RuntimeError:
        return False
    return True


def _bits(*keys: str) -> int:
    """Of a set of these dispatch keys."""
    return reduce(or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)).raw_repr() for key in keys))


# What memory of one's own and an autocast that is past have; any mode, transform, wrapper and view of values has more
_PLAIN_KEYS = _bits(
    "CPU", "CUDA", "BackendSelect", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA"
)  # fmt: skip


def _forward_mode() -> bool:
    """Whether tangents count: not in a Function's forward, whose tangents are its `jvp`'s."""
    return forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()


def _any_tangent(*arguments: Any) -> bool:
    return any(isinstance(a, Tensor) and unpack_dual(a, level=0)[1] is not None for a in arguments)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """As `torch.library.register_autograd`; but tangents are refused, and a call that nobody differentiates, as all of
    a compiled graph are, goes to the kernel from here, without a second way through the dispatcher.
    """
    function: Any = _forward if name == "forward" else _backward
    by_torch = make_autograd_impl(getattr(torch.ops.fastlstm, name).default, Info(backward, setup_context))

    def run(keyset: Any, *arguments: Any) -> Any:
        if _forward_mode() and _any_tangent(*arguments):  # torch would leave it out, without a word
            raise NotImplementedError(
                f"fastlstm::{name} has no forward mode, since torch lets no operator define one: differentiate the "
                "module itself, or compile the function that does so"
            )
        if torch.is_grad_enabled() or keyset.raw_repr() & ~_PLAIN_KEYS:
            return by_torch(keyset, *arguments)
        return function(*arguments)

    LIBRARIES[name].impl(name, torch._disable_dynamo(run), "Autograd", with_keyset=True)


def is_untransformed(*tensors: Tensor | None) -> bool:
    """True where a Function that knows no transform may take these tensors: nothing but reverse mode is active."""
    if not is_plain(*tensors):  # first: a compiler ends here
        return False
    return not torch._C._are_functorch_transforms_active() and torch.autograd.forward_ad._current_level < 0


def _is_direct(*tensors: Tensor | None) -> bool:
    """True where a kernel is called past the dispatcher: not where a derivative may be lost, of a gradient, which
    operators have, or a tangent, which they refuse.
    """
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in tensors):
        return False
    return not _forward_mode() and is_plain(*tensors)


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
