"""The host side of the kernels: which ones run, on what grid, with which tile."""

import os
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.backends import base, reference, sums
from fastlstm.backends.base import Gradients, Layer, Run
from fastlstm.backends.triton import Start, capability, cells, grid, multiprocessors, resident, stepwise, tiles
from fastlstm.backends.triton.products import INTERPRETED, pack_kernel

PACK_LINES = 16  # rows or columns that a program of pack_kernel takes


def on_device(a: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(a.device) if a.is_cuda else nullcontext()


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """(T,B,X H): the input's part of all pre-activations, in the order of the weight's rows."""
    if weight_ih.dim() == 2:
        return torch.nn.functional.linear(x.contiguous(), weight_ih, bias)  # strided, it would be T products and a sum
    return sums.add_bias(sums.linear(x, weight_ih), bias)


def start_anew(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """Start a kernel by Triton's own way, which looks at every argument. Return what was compiled, if anything was."""
    return kernel[grid](*arguments, **options)


def pack(weight: Tensor, by_row: bool, start: Start = start_anew) -> tuple[Tensor, Tensor, Tensor]:
    """High and low parts in fp16, and a scale a row or column, of (Y H,H) or (G,Y H,H); see `pack_kernel`."""
    rows, columns = weight.shape[-2:]
    lines, terms = (rows, columns) if by_row else (columns, rows)
    groups = weight.numel() // (rows * columns)
    high, low = (torch.empty_like(weight, dtype=torch.float16) for _ in range(2))
    scale = weight.new_empty(groups, lines)
    start(
        pack_kernel, (-(-lines // PACK_LINES) * groups,),
        weight, high, low, scale, rows, columns, by_row, PACK_LINES, 1 << (terms - 1).bit_length(),
        enable_fp_fusion=True,
    )  # fmt: skip
    return high, low, scale


def cut(layer: Layer, precision: str) -> tuple[Any, Any, int, int, int]:
    """What kernels know of the cell, how the layer is cut up, the groups of its batch rows, the rows of each, and H."""
    H, G = base.hidden_size(layer), base.groups_of(layer) or 1
    cell = cells.kernel(layer.cell, precision == "ieee")
    return cell, tiles.choose(H, precision, capability(layer.x.device), cell.gates), G, layer.x.shape[1] // G, H


def together(layer: Layer, precision: str, backward: bool = False) -> tiles.Grid | None:
    """The tile of a large layer's pass in one launch, where the environment asks for it and programs can meet.
    Triton's interpreter runs one after the other.
    """
    if os.environ.get("FASTLSTM_TRITON_GRID") != "1" or layer.lengths is not None or INTERPRETED.value:
        return None
    cell, _, G, rows, H = cut(layer, precision)
    product = (min(cell.of_h, 1), 1, cell.of_h * H) if backward else (cell.of_h // cell.gates, cell.gates, H)
    return tiles.across(H, precision, *product, rows, G, multiprocessors(layer.x.device))


def arrivals(places: tuple[int, int], x: Tensor) -> Tensor:
    """(programs of different batch rows, 32): the counters of `grid`, each in a cache line of its own."""
    return torch.zeros(places[0], 32, dtype=torch.int32, device=x.device)


def options(tile: tiles.Grid, precision: str) -> dict[str, Any]:
    """Of the kernels of `grid`."""
    return {
        "UNITS": tile.units, "BLOCK_B": tile.block_b, "AT_ONCE": tile.at_once,
        "PRECISION": tiles.INPUT_PRECISION[precision], "num_warps": tiles.GRID_WAYS, "num_stages": 1,
        "enable_fp_fusion": True, "launch_cooperative_grid": True,
    }  # fmt: skip


def recurrent(layer: Layer, precision: str, by_row: bool, start: Start) -> tuple[Any, Any, Any]:
    """weight_hh in the order of the cell's sums, as resident kernels take it: packed, unless it has 16 bits."""
    weight_hh = sums.in_order(layer.weights[1], layer.cell.layout.blocks_hh, -2)
    return (weight_hh, None, None) if precision == "native" or weight_hh is None else pack(weight_hh, by_row, start)


def forward(layer: Layer, save: bool, precision: str, start: Start = start_anew, axes: tuple[int, ...] = ()) -> Run:
    """The run of a layer whose tensors are as the kernels can address them.

    Args:
        start: what starts a kernel, given the kernel, its grid, its arguments and its options.
        axes: leading axes that the last states are to have.
    """
    x, lengths, reset, layout = layer.x, layer.lengths, layer.reset, layer.cell.layout
    (cell, tile, G, rows, H), (T, B, I) = cut(layer, precision), x.shape
    weight_ih, params = layer.weights[0], layer.weights[base.WEIGHTS :]
    bias, bias_hh = sums.biases(layer.cell, *layer.weights[2 : base.WEIGHTS])
    h = x.new_empty(T, B, H) if lengths is None else x.new_zeros(T, B, H)  # held steps write nothing there
    ends = tuple(x.new_empty(*axes, B, H) for _ in layer.states)
    others = tuple(x.new_empty(T, B, H) if save else None for _ in layer.states[1:])
    saved = x.new_empty(T, B, len(layout.saved) * H) if save else None
    common = {"CELL": cell.forward, "BLOCKS": cell.blocks, "S": cell.sums, "Y": cell.of_h, "GATES": cell.gates, "H": H}
    with on_device(x):
        if isinstance(tile, tiles.Resident):
            PI = tiles.padded_input(I, tile.P, precision, capability(x.device)) if weight_ih is not None else 0
            given = x if PI else None if weight_ih is None else project(x, weight_ih, bias)
            step, row = (given.stride(0), given.stride(1)) if given is not None else (0, 0)
            start(
                resident.forward_kernel, (-(-rows // tile.block_b) * G,),
                given, *((weight_ih, bias) if PI else (None, None)), *recurrent(layer, precision, True, start), bias_hh,
                params, layer.inputs, layer.states, lengths, reset, (h, *others), saved, ends,
                T, B, rows, step, row, int(layer.reverse), **common, WIDE=cell.wide,
                P=tile.P, I=I if PI else 0, PI=PI, BLOCK_B=tile.block_b, PRECISION=precision,
                num_warps=tile.forward_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
            return Run(h, ends, (*others, saved) if save else ())
        preact = None if weight_ih is None else project(x, weight_ih, bias)
        weight_hh, *_ = recurrent(layer, "native", True, start)
        if (meeting := together(layer, precision)) is not None:
            places = meeting.grid(H, rows, G)
            start(
                grid.forward_kernel, places,
                preact, weight_hh, bias_hh, params, layer.inputs, layer.states, reset, (h, *others), saved, ends,
                arrivals(places, x), T, B, rows, int(layer.reverse), **common, **options(meeting, precision),
            )  # fmt: skip
        else:
            carried = tuple(
                a.to(torch.float32, copy=True) if k or cell.reads_h else None for k, a in enumerate(layer.states)
            )
            h_n, spare = ends[0], torch.empty_like(ends[0])
            before, after = layer.states[0], h_n  # h of each row, where held steps have it apart
            places, order = tile.grid(H, rows, G), [-1, *reference.step_order(T, layer.reverse)]
            for t_prev, t in pairwise(order):
                start(
                    stepwise.forward_kernel, places,
                    preact, weight_hh, bias_hh, params, layer.inputs, before, lengths, reset, (h, *others), saved,
                    after, carried, t, t_prev if lengths is None else -1, B, rows, **common, STATES=len(ends),
                    UNITS=tile.units, BLOCK_K=tile.block_k, BLOCK_B=tile.block_b,
                    PRECISION=tiles.INPUT_PRECISION[precision], num_warps=tile.forward_warps, num_stages=tile.stages,
                    enable_fp_fusion=True,
                )  # fmt: skip
                if lengths is not None:
                    before, after, spare = after, spare, after
            h_n = h_n.copy_(h[order[-1]]) if lengths is None else before
            ends = (h_n, *(end.copy_(a) for end, a in zip(ends[1:], carried[1:]) if a is not None))
    return Run(h, ends, (*others, saved) if save else ())


class Found(NamedTuple):
    """What the kernels find backward: the gradients of the sums (T,B,S H), of the initial states (B,H), of each row's
    params (B,H) in float32, and of the inputs (T,B,H). Of the last two those that are not wanted are None.
    """

    sums: Tensor
    states: tuple[Tensor, ...]
    params: tuple[Any, ...]
    inputs: tuple[Any, ...]


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients, precision: str, start: Start = start_anew) -> Found:
    """The gradients that the kernels compute, of a layer whose tensors are as they can address them."""
    (cell, tile, G, rows, H), lengths, reset = cut(layer, precision), layer.lengths, layer.reset
    (*others, saved), (T, B), inputs = run.kept, layer.x.shape[:2], layer.inputs
    read = {code // 2 for code in cell.read}
    states = tuple(a if k in read else None for k, a in enumerate((run.h, *others)))
    starts = tuple(a if k in read else None for k, a in enumerate(layer.states))
    dh, douts = grads.h, grads.kept or (None,) * len(others)
    dh_strides = (dh.stride(0) // H, dh.stride(1) // H) if dh is not None else (0, 0)
    dsums, params = saved.new_empty(T, B, cell.sums * H), layer.weights[base.WEIGHTS :]
    dparams = tuple(
        saved.new_zeros(B, H, dtype=torch.float32) if want else None for want in needs.weights[base.WEIGHTS :]
    )
    dinputs = tuple(torch.empty_like(a) if want else None for a, want in zip(inputs, needs.inputs))
    common = {
        "CELL": cell.backward, "READ": cell.read, "CARRIED": cell.carried, "S": cell.sums, "Y": cell.of_h,
        "K": len(layer.cell.layout.saved), "H": H,
    }  # fmt: skip
    with on_device(saved):
        if isinstance(tile, tiles.Resident):
            dstates = tuple(torch.empty_like(a) for a in layer.states)
            start(
                resident.backward_kernel, (-(-rows // tile.block_b) * G,),
                dh, douts, grads.last, *recurrent(layer, precision, False, start), params, inputs, starts,
                lengths, reset, states, saved, dsums, dstates, dparams, dinputs, T, B, rows, *dh_strides,
                int(layer.reverse), **common, GATES=min(cell.gates, tile.backward_gates), DIVIDES=cell.divides,
                P=tile.P, BLOCK_B=tile.block_b, PRECISION=precision,
                num_warps=tile.backward_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
            return Found(dsums, dstates, dparams, dinputs)
        weight_hh, *_ = recurrent(layer, "native", False, start)
        if (meeting := together(layer, precision, backward=True)) is not None:
            places, dstates = meeting.grid(H, rows, G), tuple(torch.empty_like(a) for a in layer.states)
            start(
                grid.backward_kernel, places,
                dh, douts, grads.last, weight_hh, params, inputs, starts, reset, states, saved, dsums, dstates, dparams,
                dinputs, arrivals(places, saved), T, B, rows, *dh_strides, int(layer.reverse), **common,
                **options(meeting, precision),
            )  # fmt: skip
            return Found(dsums, dstates, dparams, dinputs)
        dcarried = tuple(
            torch.zeros_like(a, dtype=torch.float32) if d is None else d.to(torch.float32, copy=True)
            for a, d in zip(layer.states, grads.last)
        )
        places, order = tile.grid(H, rows, G), [-1, *reference.step_order(T, layer.reverse), -1]
        for t_prev, t, t_next in reversed(list(zip([-1, *order], order, order[1:]))):
            start(
                stepwise.backward_kernel, places,
                dh, douts, weight_hh, params, inputs, starts, lengths, reset, states, saved, dsums, dcarried,
                dparams, dinputs, t, t_prev, t_next, B, rows, *dh_strides, **common, UNITS=tile.units,
                BLOCK_K=tile.block_k, BLOCK_B=tile.block_b, PRECISION=tiles.INPUT_PRECISION[precision],
                num_warps=tile.backward_warps, num_stages=tile.stages, enable_fp_fusion=True,
            )  # fmt: skip
    return Found(dsums, tuple(a.to(b.dtype) for a, b in zip(dcarried, layer.states)), dparams, dinputs)
