"""LSTM layers on the CPU: kernels compiled by Numba when first used, all time steps of a layer in one call.

A tile of batch rows by four vectors stays in registers over the whole sum; weights are packed for it at every call, or
once for many calls (see `packed`). Threads split the batch rows, or the hidden units where rows are few.
See `forward_kernel` and `backward_kernel` for the loops.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Traits
from fastlstm.backends.cpu import address, rows_contiguous, threads_now
from fastlstm.backends.memory import pooled, unpooled
from fastlstm.backends.numba import host
from fastlstm.backends.numba.host import (
    first_steps,
    groups_of,
    input_pieces,
    lanes_of,
    panels_of,
    row,
    row_steps,
    step_row,
    zeros,
)
from fastlstm.backends.numba.prepared import backward_call, forward_call
from fastlstm.torch_private import constant

TRAITS = Traits(
    takes_biases_apart=True, keeps_weights=True, keeps_steps=True, keeps_narrow_steps=True, sorts_lengths=True
)
_INSTALLED = importlib.util.find_spec("numba") is not None
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of a float32, by the precision of its products. Fewer than 32 rows leave the unit half idle, and three pieces are half
# as many bytes of weights again: then it beats float32's own instructions from about 32 rows a thread on. How many rows
# there are must not decide, since a row's bits do not depend on the rows beside it: so each precision has a name.
PIECES = {"bf16": 1, "bf16x3": 2, "bf16x6": 3}
_OWN = {"max": max, "min": min}
_failure: str | None = None
_tried = False


@contextmanager
def _own_builtins() -> Iterator[None]:
    """In place of those that torch.export puts there while it traces, which an older numba cannot be imported with."""
    found = {name: getattr(builtins, name) for name in _OWN}
    vars(builtins).update(_OWN)
    try:
        yield
    finally:
        for name, own in _OWN.items():
            if getattr(builtins, name) is own:  # an export of another thread may have begun since
                setattr(builtins, name, found[name])


@constant
def failure() -> str | None:
    """Why the numba that is installed cannot be used, or None. The first call imports it, for all that follow."""
    global _failure, _tried
    if not _tried and _INSTALLED:
        try:
            with _own_builtins():
                importlib.import_module("fastlstm.backends.numba.tasks")
        except Exception as error:  # whatever a broken installation, or a numba newer than this backend, raises
            _failure = f"the numba backend cannot use the numba that is installed: {type(error).__name__}: {error}"
        _tried = True
    return _failure


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be taken, or None. 16-bit tensors are computed in float32, but for products of bfloat16
    where the processor has a unit for them.
    """
    if device.type not in ("cpu", "meta"):
        return f"the numba backend needs CPU tensors, got {device.type}"
    if dtype not in _DTYPES:
        return f"the numba backend needs float32, float64, bfloat16 or float16, got {dtype}"
    return failure() if _INSTALLED else "the numba backend needs numba, which is not installed"


@constant
def most_pieces() -> int:
    """Into how many pieces of bfloat16 a number may go for products that the processor has a unit for, see `PIECES`: 0
    where there is none, or numba cannot be used.
    """
    return host.most_pieces() if _INSTALLED and failure() is None else 0


def with_precision(precision: str) -> SimpleNamespace:
    """This backend with products of bfloat16 in place of float32's: of a precision of `PIECES`."""
    name, pieces = f"numba-{precision}", PIECES[precision]

    def supports_precision(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return f"the {name} backend needs float32, bfloat16 or float16, got {dtype}"
        needed = "AMX" if pieces > 1 else "AMX, or with a vdpbf16ps of twice float32's rate"
        missing = f"the {name} backend needs a processor with {needed}, and a system that lets this process use it"
        return supports(device, dtype) or (None if pieces <= most_pieces() else missing)

    def with_pieces(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            # an export may have been recorded on another processor
            return function(*args, pieces=pieces if pieces <= most_pieces() else 0, **options)

        return call

    functions = {f.__name__: with_pieces(f) for f in (forward, backward, pack)}
    return SimpleNamespace(
        supports=supports_precision,
        saved_shape=saved_shape,
        # with one piece bfloat16 is multiplied as it is, and nothing is kept for a step
        TRAITS=replace(TRAITS, takes_bfloat16=pieces == 1, keeps_narrow_steps=False),
        **functions,
    )


def pack(
    weights: Sequence[Tensor | None],
    originals: Sequence[Tensor | None] = (),
    snapshot: Sequence[Tensor | None] = (),
    pieces: int = 0,
) -> Any:
    """A `fastlstm.backends.numba.packed.PackedLayer` of weight_ih, weight_hh, bias_ih, bias_hh, which may be copies of
    a `snapshot` of `originals`.
    """
    from fastlstm.backends.numba import packed

    return packed.PackedLayer(weights, pieces, originals, snapshot)


def saved_shape(T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Shape of the gates kept for the backward pass: for each panel of units its rows side by side, as both passes read
    them, and of a stack's groups one after the other.
    """
    lanes = lanes_of(dtype)
    shape = T, panels_of(H, lanes), B if groups is None else B // groups, 4 * lanes
    return shape if groups is None else (groups, *shape)


def _computed(x: Tensor) -> Tensor:
    """What tensors in the kernel's own type are made like."""
    return x.new_empty(0, dtype=torch.float32) if x.dtype == torch.bfloat16 else x


def _set_states(a: Any, h_0: Tensor | None, c_0: Tensor | None, row_bytes: int) -> Any:
    """Give the arguments their initial states, zeros where there are none. The caller keeps what comes back alive."""
    if h_0 is None or c_0 is None:
        a.h_0 = a.c_0 = zeros(row_bytes)
        return None, None
    h_0, c_0 = rows_contiguous(h_0), rows_contiguous(c_0)
    a.h_0, a.h_0_row = row(h_0)
    a.c_0, a.c_0_row = row(c_0)
    return h_0, c_0


def forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    save: bool,
    pieces: int = 0,
    unit: bool = True,
    bias_hh: Tensor | None = None,
    layer_axis: bool = False,
    shown: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastlstm.backends.reference.forward`; the gates have `saved_shape`. States may be None for zeros, and
    `bias_hh` is added to `bias`. `layer_axis`: ``h_n`` and ``c_n`` are (1, B, H). `shown` (T, B, H): where
    to leave ``h`` as well, with zeros at held steps. `pieces`: of a number, for the matrix
    unit; with 0 only products that `host.input_pieces` names take it, and none without `unit`.
    """
    call = x, weight_ih, weight_hh, bias, h_0, c_0, mask, reverse, save
    (T, *rows, I), H, groups, like = x.shape, weight_hh.shape[-1], groups_of(weight_ih), _computed(x)
    R, dtype, narrow = prod(rows), like.dtype, like is not x
    B = R // groups
    assert shown is None or groups == 1, "a stack's outputs are hidden by its caller"
    states = (1, R, H) if layer_axis else (R, H)
    h, h_n, c_n = unpooled(x, T, R, H), like.new_empty(*states), like.new_empty(*states)
    c = unpooled(like, T, R, H) if save else like.new_empty(0)
    stacked = groups if weight_ih.dim() == 3 else None
    gates = pooled(like, *saved_shape(T, R, H, dtype, stacked)) if save else like.new_empty(0)
    x, weight_ih, weight_hh = rows_contiguous(x), rows_contiguous(weight_ih), rows_contiguous(weight_hh)
    bias, bias_hh = bias if bias is None else bias.contiguous(), bias_hh if bias_hh is None else bias_hh.contiguous()
    mask = mask if mask is None else mask.to(torch.int32).contiguous().unsqueeze(-1)
    prepared = forward_call(T, B, groups, I, H, dtype, pieces, unit, mask is not None, threads_now(), narrow)
    ours = prepared.call(x)
    a = ours.arguments
    a.rows, a.reverse, a.shown = R, reverse, address(shown)
    a.x, a.x_step, a.x_row = step_row(x)
    if narrow:
        a.out, a.out_step, a.out_row = step_row(h)
    else:
        a.h, a.h_step, a.h_row = step_row(h)
    a.h_n, a.c_n = h_n.data_ptr(), c_n.data_ptr()
    if save:
        a.c, a.c_step, a.gates = c.data_ptr(), R * H * dtype.itemsize, gates.data_ptr()
    else:
        a.c = a.c_n
    a.weight_ih, a.weight_ih_row = row(weight_ih)
    a.weight_hh, a.weight_hh_row = row(weight_hh)
    h_0, c_0 = _set_states(a, h_0, c_0, H * dtype.itemsize)
    a.bias, a.bias_hh, a.mask = address(bias), address(bias_hh), address(mask)
    stack = None
    if groups > 1:
        outputs = {"out" if narrow else "h": h, "c": c_n, "h_n": h_n, "c_n": c_n}
        of_rows = row_steps(B, x, h_0=h_0, c_0=c_0, mask=mask, **outputs)
        of_weights = first_steps(
            weight_ih=weight_ih, weight_hh=weight_hh, bias=bias, bias_hh=bias_hh, gates=gates if save else None
        )
        stack = groups, of_rows | of_weights, prepared.steps
    large, _ = prepared.run(ours, stack)  # a number that the matrix unit cannot take
    if large:
        return forward(*call, unit=False, bias_hh=bias_hh, layer_axis=layer_axis, shown=shown)
    return h, h_n, c_n, c, gates


def backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    mask: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    reverse: bool,
    needs: list[bool],
    packed: Any = None,
    pieces: int = 0,
    unit: bool = True,
    hides: bool = False,
) -> tuple[Tensor | None, ...]:
    """See `fastlstm.backends.reference.backward`. `packed`: a `PackedLayer` of these weights. `unit`: whether the
    matrix unit may be used. `hides`: ``dh`` of held steps does not count.
    """
    (T, *rows, I), H, groups, like = x.shape, weight_hh.shape[-1], groups_of(weight_ih), _computed(x)
    R, dtype, narrow = prod(rows), like.dtype, like is not x
    B = R // groups
    if R == 0:
        inputs = (x.new_empty(T, R, I), weight_ih, weight_hh, bias, h_0, c_0)
        return (*(torch.zeros_like(a) if need and a is not None else None for a, need in zip(inputs, needs)),)
    call = dh, dh_n, dc_n, dc, x, weight_ih, weight_hh, bias, h_0, c_0, mask, h, c, gates, reverse, needs
    x, weight_ih, weight_hh = rows_contiguous(x), rows_contiguous(weight_ih), rows_contiguous(weight_hh)
    h, c, gates = h.contiguous(), c.contiguous(), gates.contiguous()
    mask = mask if mask is None else mask.to(torch.int32).contiguous().unsqueeze(-1)
    for_hh = T > 1 or needs[4]
    of_same = packed is not None and packed.pieces == pieces
    if of_same and needs[0]:
        of_same = packed.of_x == input_pieces(I, H, dtype, pieces, unit)
    ready = packed.transpose() if of_same and (for_hh or needs[0]) else None  # whose memory it keeps alive
    prepared = backward_call(
        T, B, groups, I, H, dtype, pieces, unit, mask is not None, threads_now(), any(needs[1:4]), needs[0],
        ready is None and needs[0], ready is None and for_hh, narrow,
    )  # fmt: skip
    ours = prepared.call(x)
    a = ours.arguments
    dx = unpooled(x, T, R, I) if needs[0] else None
    dweight_ih = unpooled(x, *weight_ih.shape) if needs[1] else None
    dweight_hh = unpooled(x, *weight_hh.shape) if needs[2] else None
    dbias = like.new_empty(bias.shape) if needs[3] and bias is not None else None
    dh_0 = like.new_empty(R, H) if needs[4] else None
    dc_0 = like.new_empty(R, H) if needs[5] else None
    if ready is not None:
        a.packed_ih, a.packed_hh = ready[0].packed_ih, ready[0].packed_hh
    in_groups = gates.dim() == 5  # written for these, not by one layer for all rows
    a.rows, a.reverse, a.hides, a.gate_rows = R, reverse, hides, B if in_groups else R
    a.x, a.x_step, a.x_row = step_row(x)
    a.weight_ih, a.weight_ih_row = row(weight_ih)
    a.weight_hh, a.weight_hh_row = row(weight_hh)
    h_0, c_0 = _set_states(a, h_0, c_0, H * dtype.itemsize)
    a.h, a.c, a.gates, a.mask = h.data_ptr(), c.data_ptr(), gates.data_ptr(), address(mask)
    if dh is not None:
        dh = rows_contiguous(dh)
        a.dh, a.dh_step, a.dh_row = step_row(dh)
    if dh_n is not None:
        dh_n = rows_contiguous(dh_n)
        a.dh_n, a.dh_n_row = row(dh_n)
    if dc_n is not None:
        dc_n = rows_contiguous(dc_n)
        a.dc_n, a.dc_n_row = row(dc_n)
    if dc is not None:
        dc = rows_contiguous(dc)
        a.dc, a.dc_step, a.dc_row = step_row(dc)
    a.dx, a.dweight_ih, a.dweight_hh, a.dbias = address(dx), address(dweight_ih), address(dweight_hh), address(dbias)
    a.dh_0, a.dc_0 = address(dh_0), address(dc_0)
    stack = None
    if groups > 1:
        of_rows = row_steps(
            B, x, h_0=h_0, c_0=c_0, mask=mask, h=h, c=c, dh=dh, dh_n=dh_n, dc_n=dc_n, dc=dc, dx=dx, dh_0=dh_0,
            dc_0=dc_0, gates=None if in_groups else gates,
        )  # fmt: skip
        of_weights = first_steps(
            weight_ih=weight_ih, weight_hh=weight_hh, dweight_ih=dweight_ih, dweight_hh=dweight_hh, dbias=dbias,
            gates=gates if in_groups else None,
        )  # fmt: skip
        stack = groups, of_rows | of_weights, prepared.steps
    large, _ = prepared.run(ours, stack)
    return backward(*call, unit=False, hides=hides) if large else (dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0)
