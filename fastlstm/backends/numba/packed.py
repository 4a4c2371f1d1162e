"""Weights packed for inference and kept between calls, with the arguments of a call made ready."""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from fastlstm.backends.cpu import PackedWeights, rows_contiguous
from fastlstm.backends.numba import host, tasks
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
        a, *_ = host.begin("ForwardArguments", packed, 1, 1, scratch=0)
        a.I, a.H, a.bias, a.bias_hh, a.packed = self.I, self.H, bias, bias_hh, packed.data_ptr()
        a.weight_ih, a.weight_ih_row = host.row(weight_ih)
        a.weight_hh, a.weight_hh_row = host.row(weight_hh)
        a.h_0 = a.c_0 = zeros.data_ptr()
        self.arguments = a
        tasks.run("forward", self.arguments, 1)  # of no steps and no rows: it only packs

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        (T, B, _), H = x.shape, self.H
        threads, parts = host.split(B, H, self.I + H, self.panels)
        x = rows_contiguous(x)
        h, h_n, c_n = x.new_empty(T, B, H), x.new_empty(B, H), x.new_empty(B, H)
        a, memory, _ = host.refresh(self.arguments, x, threads, parts, scratch=7 * CHUNK * self.lanes)
        a.T, a.B, a.rows, a.reverse = T, B, B, reverse
        a.x, a.x_step, a.x_row = host.step_row(x)
        a.h, a.h_n, a.c, a.c_n = h.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), c_n.data_ptr()
        if hx is not None:
            h_0, c_0 = (rows_contiguous(state) for state in hx)
            a.h_0, a.h_0_row = host.row(h_0)
            a.c_0, a.c_0_row = host.row(c_0)
        stale = ctypes.c_int64()
        a.stale = ctypes.addressof(stale)
        tasks.run("forward", a, threads)
        del memory
        return None if stale.value else (h, h_n, c_n)
