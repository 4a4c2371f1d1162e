"""Weights packed for inference and kept between calls, with the arguments of a call made ready."""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from fastlstm.backends.cpu import PackedWeights, rows_contiguous
from fastlstm.backends.numba import host, tasks
from fastlstm.backends.numba.arguments import ForwardArguments
from fastlstm.backends.numba.shared import CHUNK


class PackedLayer(PackedWeights):
    """See `PackedWeights`."""

    backend = "numba"

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        super().__init__(weights)
        weight_ih, weight_hh, biases = self.weight_ih, self.weight_hh, self.biases
        self.lanes = host.lanes_of(self.dtype)
        self.panels = host.panels_of(self.H, self.lanes)
        packed = weight_ih.new_empty(self.panels * (self.I + self.H + 1) * 4 * self.lanes)
        zeros = weight_ih.new_zeros(self.H)
        self.memory = packed, zeros
        bias, bias_hh = [a.data_ptr() for a in biases] + [0] * (2 - len(biases))
        self.arguments = ForwardArguments(
            I=self.I, H=self.H, bias=bias, bias_hh=bias_hh, packed=packed.data_ptr(), h_0=zeros.data_ptr(),
            c_0=zeros.data_ptr(), **host.workspace(packed, 1, 1, 0)[1], **host.strides("weight_ih", weight_ih, "row"),
            **host.strides("weight_hh", weight_hh, "row"),
        )  # fmt: skip
        tasks.run("forward", self.arguments, 1)  # of no steps and no rows: it only packs

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        (T, B, _), H, size = x.shape, self.H, self.dtype.itemsize
        threads, parts = host.split(B, H, self.I + H, self.panels)
        x = rows_contiguous(x)
        h, h_n, c_n = x.new_empty(T, B, H), x.new_empty(B, H), x.new_empty(B, H)
        a = ForwardArguments.from_buffer_copy(self.arguments)  # other threads may be calling
        memory, a.scratch, a.scratch_bytes, a.barrier = host.scratch(x, threads, parts, 7 * CHUNK * self.lanes)
        a.T, a.B, a.rows, a.reverse, a.parts = T, B, B, reverse, parts
        a.x, a.h, a.h_n, a.c, a.c_n = x.data_ptr(), h.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), c_n.data_ptr()
        a.x_step, a.x_row = x.stride(0) * size, x.stride(1) * size
        if hx is not None:
            h_0, c_0 = (rows_contiguous(state) for state in hx)
            a.h_0, a.h_0_row, a.c_0, a.c_0_row = (
                h_0.data_ptr(),
                h_0.stride(0) * size,
                c_0.data_ptr(),
                c_0.stride(0) * size,
            )
        stale = ctypes.c_int64()
        a.stale = ctypes.addressof(stale)
        tasks.run("forward", a, threads)
        del memory
        return None if stale.value else (h, h_n, c_n)
