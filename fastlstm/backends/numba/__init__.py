"""LSTM layers on the CPU: kernels compiled by Numba when first used, all time steps of a layer in one call.

A tile of batch rows by four vectors stays in registers over the whole sum; weights are packed for it at every call, or
once while no gradient is wanted (see `packed`). Threads split the batch rows, or the hidden units where rows are few.
See `forward_kernel` and `backward_kernel` for the loops.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.cpu import address, rows_contiguous
from fastlstm.backends.memory import empty
from fastlstm.backends.numba.host import (
    first_steps,
    groups_of,
    lanes_of,
    panels_of,
    row_steps,
    split,
    split_stack,
    strides,
    weight_fields,
    workspace,
)

SIXTEEN_BIT = False  # whether forward and backward take 16-bit tensors
_CHUNK_ROWS = 256  # (step, row) pairs whose dpreact is turned into gradients together
_INSTALLED = importlib.util.find_spec("numba") is not None
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be taken, or None. 16-bit tensors are computed in float32."""
    if device.type not in ("cpu", "meta"):
        return f"the numba backend needs CPU tensors, got {device.type}"
    if dtype not in _DTYPES:
        return f"the numba backend needs float32, float64, bfloat16 or float16, got {dtype}"
    return None if _INSTALLED else "the numba backend needs numba, which is not installed"


def pack(weights: Sequence[Tensor | None]) -> Any:
    """A `fastlstm.backends.numba.packed.PackedLayer` of weight_ih, weight_hh, bias_ih, bias_hh."""
    from fastlstm.backends.numba import packed

    return packed.PackedLayer(weights)


def saved_shape(T: int, B: int, H: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the gates kept for the backward pass:
    for each panel of units its rows side by side, as both passes read them.
    """
    lanes = lanes_of(dtype)
    return T, panels_of(H, lanes), B, 4 * lanes


def forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastlstm.backends.reference.forward`; the gates have `saved_shape`."""
    from fastlstm.backends.numba import tasks
    from fastlstm.backends.numba.arguments import ForwardArguments

    (T, R, I), H, groups = x.shape, weight_hh.shape[-1], groups_of(weight_ih)
    B = R // groups
    lanes = lanes_of(x.dtype)
    panels = panels_of(H, lanes)
    h, h_n, c_n = empty(x, T, R, H), x.new_empty(R, H), x.new_empty(R, H)
    c = empty(x, T, R, H) if save else x.new_empty(0)
    gates = empty(x, T, panels, R, 4 * lanes) if save else x.new_empty(0)
    x, weight_ih, weight_hh, h_0, c_0 = (rows_contiguous(a) for a in (x, weight_ih, weight_hh, h_0, c_0))
    bias = bias if bias is None else bias.contiguous()
    mask = mask if mask is None else mask.to(torch.int32).contiguous().unsqueeze(-1)
    threads, parts = split(B, H, I + H, panels) if groups == 1 else split_stack(groups, B, H, I + H)
    packed = empty(x, 1 if groups == 1 else threads, panels * (I + H + 1) * 4 * lanes)
    held = B * H if mask is not None else 0
    _scratch, fields = workspace(x, threads, parts, 64 * 7 * lanes + held)  # the name keeps the memory alive
    arguments = ForwardArguments(
        T=T, B=B, rows=R, I=I, H=H, reverse=reverse, mask=address(mask), bias=address(bias),
        h=h.data_ptr(), c=c.data_ptr() if save else c_n.data_ptr(), c_step=R * H * x.element_size() if save else 0,
        gates=gates.data_ptr() if save else 0, h_n=h_n.data_ptr(), c_n=c_n.data_ptr(),
        packed=packed.data_ptr(), **fields,
        **strides("x", x, "step", "row"), **weight_fields("weight_ih", weight_ih),
        **weight_fields("weight_hh", weight_hh), **strides("h_0", h_0, "row"), **strides("c_0", c_0, "row"),
    )  # fmt: skip
    if groups == 1:
        tasks.run("forward", arguments, threads)
    else:
        of_rows = row_steps(B, x=x, h_0=h_0, c_0=c_0, mask=mask, h=h, c=c_n, gates=gates, h_n=h_n, c_n=c_n)
        of_weights = first_steps(weight_ih=weight_ih, weight_hh=weight_hh, bias=bias)
        by_lane = {"scratch": arguments.scratch_bytes, **first_steps(packed=packed)}
        tasks.run_stack("forward", arguments, groups, of_rows | of_weights, by_lane, threads)
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
    h_0: Tensor,
    c_0: Tensor,
    mask: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    reverse: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """See `fastlstm.backends.reference.backward`."""
    from fastlstm.backends.numba import tasks
    from fastlstm.backends.numba.arguments import BackwardArguments

    (T, R, I), H, groups = x.shape, weight_hh.shape[-1], groups_of(weight_ih)
    B = R // groups
    lanes = lanes_of(x.dtype)
    panels = panels_of(H, lanes)
    x, weight_ih, weight_hh, h_0, c_0 = (rows_contiguous(a) for a in (x, weight_ih, weight_hh, h_0, c_0))
    h, c, gates = h.contiguous(), c.contiguous(), gates.contiguous()
    dh, dh_n, dc_n, dc = (a if a is None else rows_contiguous(a) for a in (dh, dh_n, dc_n, dc))
    mask = mask if mask is None else mask.to(torch.int32).contiguous().unsqueeze(-1)
    dx = empty(x, T, R, I) if needs[0] else None
    dweight_ih = empty(x, *weight_ih.shape) if needs[1] else None
    dweight_hh = empty(x, *weight_hh.shape) if needs[2] else None
    dbias = x.new_empty(bias.shape) if needs[3] and bias is not None else None
    dh_0, dc_0 = x.new_empty(R, H), x.new_empty(R, H)
    threads, parts = split(B, H, I + H, panels) if groups == 1 else split_stack(groups, B, H, I + H)
    sets = 1 if groups == 1 else threads  # of buffers
    chunk = -(-T // max(1, round(T * B / _CHUNK_ROWS)))
    dpreact = empty(x, sets, panels, 2 * chunk, B, 4 * lanes)
    dc_carried = x.new_empty(sets, panels * B * lanes * (1 if mask is None else 2))
    packed = panels * 4 * lanes * 4 * lanes  # of one group of four vectors
    packed_hh = empty(x, sets, panels_of(H, 4 * lanes) * packed)
    packed_ih = empty(x, sets, panels_of(I, 4 * lanes) * packed) if needs[0] else None
    sums = any(needs[1:])
    dweights = empty(x, sets, panels * (I + H + 1) * 4 * lanes) if sums else None
    strips = empty(x, sets, 2, chunk * B * panels_of(I + H + 1, 24) * 24) if sums else None
    _scratch, fields = workspace(x, threads, parts, 64 * 7 * lanes)  # the name keeps the memory alive
    arguments = BackwardArguments(
        T=T, B=B, rows=R, I=I, H=H, reverse=reverse, mask=address(mask),
        h=h.data_ptr(), c=c.data_ptr(), gates=gates.data_ptr(), chunk=chunk,
        dpreact=dpreact.data_ptr(), dc_carried=dc_carried.data_ptr(), packed_hh=packed_hh.data_ptr(),
        packed_ih=address(packed_ih), strips=address(strips),
        strips_bytes=0 if strips is None else strips.stride(1) * x.element_size(), dweights=address(dweights),
        dx=address(dx), dweight_ih=address(dweight_ih),
        dweight_hh=address(dweight_hh), dbias=address(dbias), dh_0=dh_0.data_ptr(), dc_0=dc_0.data_ptr(), **fields,
        **strides("x", x, "step", "row"), **weight_fields("weight_ih", weight_ih),
        **weight_fields("weight_hh", weight_hh), **strides("h_0", h_0, "row"), **strides("c_0", c_0, "row"),
        **strides("dh", dh, "step", "row"), **strides("dh_n", dh_n, "row"), **strides("dc_n", dc_n, "row"),
        **strides("dc", dc, "step", "row"),
    )  # fmt: skip
    if groups == 1:
        tasks.run("backward", arguments, threads)
    else:
        of_rows = row_steps(
            B, x=x, h_0=h_0, c_0=c_0, mask=mask, h=h, c=c, gates=gates, dh=dh, dh_n=dh_n, dc_n=dc_n, dc=dc, dx=dx,
            dh_0=dh_0, dc_0=dc_0,
        )  # fmt: skip
        of_weights = first_steps(
            weight_ih=weight_ih, weight_hh=weight_hh, dweight_ih=dweight_ih, dweight_hh=dweight_hh, dbias=dbias
        )
        by_lane = {"scratch": arguments.scratch_bytes} | first_steps(
            dpreact=dpreact,
            dc_carried=dc_carried,
            packed_hh=packed_hh,
            packed_ih=packed_ih,
            strips=strips,
            dweights=dweights,
        )
        tasks.run_stack("backward", arguments, groups, of_rows | of_weights, by_lane, threads)
    return dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0
