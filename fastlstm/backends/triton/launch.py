"""The host side of the kernels: which ones run, on what grid, with which tile."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from fastlstm.backends import base, reference, sums
from fastlstm.backends.base import Layer, Run
from fastlstm.backends.triton import Start, capability, resident, stepwise, tiles
from fastlstm.backends.triton.products import pack_kernel

choose, padded_input = cache(tiles.choose), cache(tiles.padded_input)  # which a short call would notice
PACK_LINES = 16  # rows or columns that a program of pack_kernel takes


def on_device(a: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(a.device) if a.is_cuda else nullcontext()


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """(T,B,4H): the input's part of all pre-activations."""
    if weight_ih.dim() == 2:
        return torch.nn.functional.linear(x.contiguous(), weight_ih, bias)  # strided, it would be T products and a sum
    return sums.add_bias(sums.linear(x, weight_ih), bias)


def start_anew(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """Start a kernel by Triton's own way, which looks at every argument. Return what was compiled, if anything was."""
    return kernel[grid](*arguments, **options)


def pack(weight: Tensor, by_row: bool, start: Start = start_anew) -> tuple[Tensor, Tensor, Tensor]:
    """High and low parts in fp16, and a scale a row or column, of (4H,H) or (G,4H,H); see `pack_kernel`."""
    rows, columns = weight.shape[-2:]
    lines, terms = (rows, columns) if by_row else (columns, rows)
    groups = weight.numel() // (rows * columns)
    high, low = (torch.empty_like(weight, dtype=torch.float16) for _ in range(2))
    scale = weight.new_empty(groups, lines)
    start(
        pack_kernel, (-(-lines // PACK_LINES) * groups,),
        weight, high, low, scale, rows, columns, by_row, PACK_LINES, 1 << (terms - 1).bit_length(),
    )  # fmt: skip
    return high, low, scale


def cut(layer: Layer, precision: str) -> tuple[Any, int, int]:
    """How a layer is cut up, the groups of its batch rows, and the rows of each."""
    shape = cast(Tensor, layer.weights[1]).shape
    G = shape[0] if len(shape) == 3 else 1
    return choose(shape[-1], precision, capability(layer.x.device)), G, layer.x.shape[1] // G


def forward(layer: Layer, save: bool, precision: str, start: Start = start_anew, ends: tuple[int, ...] = ()) -> Run:
    """The run of a layer whose tensors are as the kernels can address them.

    Args:
        start: what starts a kernel, given the kernel, its grid, its arguments and its options.
        ends: leading axes that the last states are to have.
    """
    x, (weight_ih, weight_hh, *_), (h_0, c_0), lengths, reset, reverse, *_ = cast(Any, layer)
    (T, B, I), H, bias = x.shape, weight_hh.shape[-1], base.sum_of_biases(layer)
    tile, G, rows = cut(layer, precision)
    h = x.new_empty(T, B, H) if lengths is None else x.new_zeros(T, B, H)  # held steps write nothing there
    h_n, c_n = x.new_empty(*ends, B, H), x.new_empty(*ends, B, H)
    c, gates = (x.new_empty(T, B, H), x.new_empty(T, B, 4 * H)) if save else (None, None)
    with on_device(x):
        if isinstance(tile, tiles.Resident):
            PI = padded_input(I, tile.P, precision, capability(x.device))
            if not PI:
                x = project(x, weight_ih, bias)
            weights = pack(weight_hh, True, start) if precision != "native" else (weight_hh, None, None)
            start(
                resident.forward_kernel, (-(-rows // tile.block_b) * G,),
                x, *((weight_ih, bias) if PI else (None, None)), *weights, h_0, c_0, lengths, reset,
                h, c, gates, h_n, c_n, T, B, rows, x.stride(0), x.stride(1), int(reverse),
                H, tile.P, I if PI else 0, PI, tile.block_b, precision,
                num_warps=tile.forward_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            preact, c_carried = project(x, weight_ih, bias), c_0.to(torch.float32, copy=True)
            before, after, spare = h_0, h_n, torch.empty_like(h_n)  # h of each row, where held steps have it apart
            grid, order = tile.grid(H, rows, G), [-1, *reference.step_order(T, reverse)]
            for t_prev, t in pairwise(order):
                start(
                    stepwise.forward_kernel, grid,
                    preact, weight_hh, before, lengths, reset, h, c, gates, after, c_carried,
                    t, t_prev if lengths is None else -1, B, rows,
                    H, tile.units, tile.block_k, tile.block_b, tiles.INPUT_PRECISION[precision],
                    num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
                )  # fmt: skip
                if lengths is not None:
                    before, after, spare = after, spare, after
            h_n = h_n.copy_(h[order[-1]]) if lengths is None else before
            c_n.copy_(c_carried)
    return Run(h, (h_n, c_n), (c, gates) if save else ())


def backward(
    grads: Run, layer: Layer, kept: tuple[Tensor, ...], precision: str, start: Start = start_anew
) -> tuple[Tensor, Tensor, Tensor]:
    """dpreact (T,B,4H), dh_0 and dc_0, which have the shape of c_0."""
    weight_hh, c_0, lengths, reset = cast(Any, (layer.weights[1], layer.states[1], layer.lengths, layer.reset))
    (dh, (dh_n, dc_n), (dc, *_)), (c, gates) = (grads.h, grads.last, (*grads.kept, None)), kept
    (T, B, H), (tile, G, rows) = c.shape, cut(layer, precision)
    dpreact = torch.empty_like(gates)
    dh_strides, dc_strides = (a.stride()[:2] if a is not None else (0, 0) for a in (dh, dc))
    with on_device(gates):
        if isinstance(tile, tiles.Resident):
            dh_0, dc_0 = torch.empty_like(c_0), torch.empty_like(c_0)
            weights = pack(weight_hh, False, start) if precision != "native" else (weight_hh, None, None)
            start(
                resident.backward_kernel, (-(-rows // tile.block_b) * G,),
                dh, dc, dh_n, dc_n, *weights, c_0, lengths, reset, c, gates, dpreact, dh_0, dc_0, T, B, rows,
                *dh_strides, *dc_strides, int(layer.reverse), H, tile.P, tile.block_b, precision,
                num_warps=tile.backward_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
            return dpreact, dh_0, dc_0
        dh_carried, dc_carried = (
            torch.zeros_like(c_0, dtype=torch.float32) if a is None else a.to(torch.float32, copy=True)
            for a in (dh_n, dc_n)
        )
        grid, order = tile.grid(H, rows, G), [-1, *reference.step_order(T, layer.reverse), -1]
        for t_prev, t, t_next in reversed(list(zip([-1, *order], order, order[1:]))):
            start(
                stepwise.backward_kernel, grid,
                dh, dc, weight_hh, c_0, lengths, reset, c, gates, dpreact, dh_carried, dc_carried,
                t, t_prev, t_next, B, rows, *dh_strides, *dc_strides,
                H, tile.units, tile.block_k, tile.block_b, tiles.INPUT_PRECISION[precision],
                num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return dpreact, dh_carried.to(c_0.dtype), dc_carried.to(c_0.dtype)
