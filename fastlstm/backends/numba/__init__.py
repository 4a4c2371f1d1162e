"""LSTM layers on the CPU: kernels compiled by Numba when first used, all time steps of a layer in one call.

A tile of batch rows by four vectors stays in registers over the whole sum; weights are packed for it at every call.
Threads split the batch rows, or the hidden units where rows are few. See `forward_kernel` and `backward_kernel` for the
loops.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from fastlstm.backends.numba.memory import empty

_CHUNK_ROWS = 256  # (step, row) pairs whose dpreact is turned into gradients together
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be taken, or None. 16-bit tensors are computed in float32."""
    if device.type not in ("cpu", "meta"):
        return f"the numba backend needs CPU tensors, got {device.type}"
    if dtype not in _DTYPES:
        return f"the numba backend needs float32, float64, bfloat16 or float16, got {dtype}"
    return None


@cache
def _lanes(dtype: torch.dtype) -> int:
    from fastlstm.backends.numba.simd import VECTOR_BYTES

    return VECTOR_BYTES // dtype.itemsize


def _panels(size: int, lanes: int) -> int:
    return (size + lanes - 1) // lanes


def saved_shape(T: int, B: int, H: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the gates kept for the backward pass:
    for each panel of units its rows side by side, as both passes read them.
    """
    lanes = _lanes(dtype)
    return T, _panels(H, lanes), B, 4 * lanes


def _rows_contiguous(a: Tensor) -> Tensor:
    return a if a.stride(-1) == 1 or a.shape[-1] == 1 else a.contiguous()


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # the parent's threads do not exist here, and libgomp would wait for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads_now() -> int:
    """Threads a call may use: torch's number, or one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def _split(B: int, H: int, K: int, panels: int) -> tuple[int, int]:
    """Threads, and into how many parts they split the batch rows; threads within a part split the units.

    Parts meet nobody, but each reads all weights; a split of units halves what a thread reads, for a barrier of a
    microsecond a step. So a part is given the rows that fill a pass over a panel, and all other threads go to units.
    """
    if B * 4 * H * K < 150_000:  # multiply-adds of a step: the barrier would cost what the second thread saves
        return 1, 1
    threads = threads_now()
    return threads, min(threads, max(1, B // 64, _panels(threads, panels)))


def _workspace(like: Tensor, threads: int, parts: int, floats: int) -> tuple[Tensor, dict[str, int]]:
    """Barrier counters, constants and each thread's scratch, in one allocation; and the fields that every task has."""
    from fastlstm.backends.numba import tasks

    size = like.element_size()
    barriers, constants, each = 16 * (threads + 1), 272, (floats + 15) // 16 * 16  # in elements of 4 or 8 bytes
    memory = like.new_empty(barriers + constants + threads * each)
    memory[: barriers + constants].zero_()
    memory[barriers + 1024 // size] = 1.0
    at = memory.data_ptr()
    return memory, {
        **tasks.primitives(size),
        "parts": parts,
        "barrier": at,
        "relax": tasks.relax(),
        "constants": at + barriers * size,
        "scratch": at + (barriers + constants) * size,
        "scratch_bytes": each * size,
    }


def _strides(name: str, a: Tensor | None, *suffixes: str) -> dict[str, int]:
    """The address of `a` and its leading strides in bytes, as fields of an argument struct."""
    if a is None:
        return {}
    size = a.element_size()
    return {name: a.data_ptr(), **{f"{name}_{s}": stride * size for s, stride in zip(suffixes, a.stride())}}


def _groups(weight: Tensor) -> int:
    """How many layers these weights are: 3 dimensions are a stack, each with its group of batch rows."""
    return weight.shape[0] if weight.dim() == 3 else 1


def _split_stack(groups: int, B: int, H: int, K: int) -> tuple[int, int]:
    """As `_split`, for groups of B rows: each runs on one thread, and needs no barrier."""
    return (1 if groups * B * 4 * H * K < 150_000 else min(threads_now(), groups)), 1


def _weight(name: str, a: Tensor) -> dict[str, int]:
    return _strides(name, a if a.dim() == 2 else a[0], "row")


def _row_steps(B: int, **tensors: Tensor | None) -> dict[str, int]:
    """Bytes from one group's B rows to the next one's."""
    return {k: B * a.stride(-2) * a.element_size() for k, a in tensors.items() if a is not None and a.dim() > 1}


def _first_steps(**tensors: Tensor | None) -> dict[str, int]:
    return {k: a.stride(0) * a.element_size() for k, a in tensors.items() if a is not None}


def _address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


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

    (T, R, I), H, groups = x.shape, weight_hh.shape[-1], _groups(weight_ih)
    B = R // groups
    lanes = _lanes(x.dtype)
    panels = _panels(H, lanes)
    h, h_n, c_n = x.new_empty(T, R, H), x.new_empty(R, H), x.new_empty(R, H)
    c = empty(x, T, R, H) if save else x.new_empty(0)
    gates = empty(x, T, panels, R, 4 * lanes) if save else x.new_empty(0)
    x, weight_ih, weight_hh, h_0, c_0 = (_rows_contiguous(a) for a in (x, weight_ih, weight_hh, h_0, c_0))
    bias = bias if bias is None else bias.contiguous()
    mask = mask if mask is None else mask.to(torch.int32).contiguous().unsqueeze(-1)
    threads, parts = _split(B, H, I + H, panels) if groups == 1 else _split_stack(groups, B, H, I + H)
    packed = x.new_empty(1 if groups == 1 else threads, panels * (I + H + 1) * 4 * lanes)
    held = B * H if mask is not None else 0
    _scratch, fields = _workspace(x, threads, parts, 64 * 7 * lanes + held)  # the name keeps the memory alive
    arguments = ForwardArguments(
        T=T, B=B, rows=R, I=I, H=H, reverse=reverse, mask=_address(mask), bias=_address(bias),
        h=h.data_ptr(), c=c.data_ptr() if save else c_n.data_ptr(), c_step=R * H * x.element_size() if save else 0,
        gates=gates.data_ptr() if save else 0, h_n=h_n.data_ptr(), c_n=c_n.data_ptr(),
        packed=packed.data_ptr(), pack=1, **fields,
        **_strides("x", x, "step", "row"), **_weight("weight_ih", weight_ih),
        **_weight("weight_hh", weight_hh), **_strides("h_0", h_0, "row"), **_strides("c_0", c_0, "row"),
    )  # fmt: skip
    if groups == 1:
        tasks.run("forward", arguments, threads)
    else:
        of_rows = _row_steps(B, x=x, h_0=h_0, c_0=c_0, mask=mask, h=h, c=c_n, gates=gates, h_n=h_n, c_n=c_n)
        of_weights = _first_steps(weight_ih=weight_ih, weight_hh=weight_hh, bias=bias)
        by_lane = {"scratch": arguments.scratch_bytes, **_first_steps(packed=packed)}
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

    (T, R, I), H, groups = x.shape, weight_hh.shape[-1], _groups(weight_ih)
    B = R // groups
    lanes = _lanes(x.dtype)
    panels = _panels(H, lanes)
    x, weight_ih, weight_hh, h_0, c_0 = (_rows_contiguous(a) for a in (x, weight_ih, weight_hh, h_0, c_0))
    h, c, gates = h.contiguous(), c.contiguous(), gates.contiguous()
    dh, dh_n, dc_n, dc = (a if a is None else _rows_contiguous(a) for a in (dh, dh_n, dc_n, dc))
    mask = mask if mask is None else mask.to(torch.int32).contiguous().unsqueeze(-1)
    dx = x.new_empty(T, R, I) if needs[0] else None
    dweight_ih = x.new_empty(weight_ih.shape) if needs[1] else None
    dweight_hh = x.new_empty(weight_hh.shape) if needs[2] else None
    dbias = x.new_empty(bias.shape) if needs[3] and bias is not None else None
    dh_0, dc_0 = x.new_empty(R, H), x.new_empty(R, H)
    threads, parts = _split(B, H, I + H, panels) if groups == 1 else _split_stack(groups, B, H, I + H)
    sets = 1 if groups == 1 else threads  # of buffers
    chunk = -(-T // max(1, round(T * B / _CHUNK_ROWS)))
    dpreact = empty(x, sets, panels, 2 * chunk, B, 4 * lanes)
    dc_carried = x.new_empty(sets, panels * B * lanes * (1 if mask is None else 2))
    packed = panels * 4 * lanes * 4 * lanes  # of one group of four vectors
    packed_hh = x.new_empty(sets, _panels(H, 4 * lanes) * packed)
    packed_ih = x.new_empty(sets, _panels(I, 4 * lanes) * packed) if needs[0] else None
    sums = any(needs[1:])
    dweights = x.new_empty(sets, panels * (I + H + 1) * 4 * lanes) if sums else None
    floats = max(64 * 7 * lanes, chunk * B * _panels(I + H + 1, 24) * 24 if sums else 0)
    _scratch, fields = _workspace(x, threads, parts, floats)  # the name keeps the memory alive
    arguments = BackwardArguments(
        T=T, B=B, rows=R, I=I, H=H, reverse=reverse, mask=_address(mask),
        h=h.data_ptr(), c=c.data_ptr(), gates=gates.data_ptr(), chunk=chunk,
        dpreact=dpreact.data_ptr(), dc_carried=dc_carried.data_ptr(), packed_hh=packed_hh.data_ptr(),
        packed_ih=_address(packed_ih), dweights=_address(dweights), dx=_address(dx), dweight_ih=_address(dweight_ih),
        dweight_hh=_address(dweight_hh), dbias=_address(dbias), dh_0=dh_0.data_ptr(), dc_0=dc_0.data_ptr(), **fields,
        **_strides("x", x, "step", "row"), **_weight("weight_ih", weight_ih),
        **_weight("weight_hh", weight_hh), **_strides("h_0", h_0, "row"), **_strides("c_0", c_0, "row"),
        **_strides("dh", dh, "step", "row"), **_strides("dh_n", dh_n, "row"), **_strides("dc_n", dc_n, "row"),
        **_strides("dc", dc, "step", "row"),
    )  # fmt: skip
    if groups == 1:
        tasks.run("backward", arguments, threads)
    else:
        of_rows = _row_steps(
            B, x=x, h_0=h_0, c_0=c_0, mask=mask, h=h, c=c, gates=gates, dh=dh, dh_n=dh_n, dc_n=dc_n, dc=dc, dx=dx,
            dh_0=dh_0, dc_0=dc_0,
        )  # fmt: skip
        of_weights = _first_steps(
            weight_ih=weight_ih, weight_hh=weight_hh, dweight_ih=dweight_ih, dweight_hh=dweight_hh, dbias=dbias
        )
        by_lane = {"scratch": arguments.scratch_bytes} | _first_steps(
            dpreact=dpreact, dc_carried=dc_carried, packed_hh=packed_hh, packed_ih=packed_ih, dweights=dweights
        )
        tasks.run_stack("backward", arguments, groups, of_rows | of_weights, by_lane, threads)
    return dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0
