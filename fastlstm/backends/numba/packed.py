"""Weights packed for inference and kept between calls, with the arguments of a call made ready."""

import ctypes
from collections.abc import Sequence

from torch import Tensor

from fastlstm.backends.numba import host, tasks
from fastlstm.backends.numba.shared import CHUNK


class PackedLayer:
    """One layer's weights as the kernel reads them, for calls that need no gradient.

    A change that PyTorch counts is seen by `is_of`. One that it does not count, made through ``.data`` or numpy, is
    looked for by the kernel at every call: in all biases and in one element of each row and column of the weights. What
    changes none of those is missed.
    """

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        """`weights`: weight_ih (4H, I), weight_hh (4H, H), and bias_ih and bias_hh (4H,) or None, all contiguous."""
        self.keys = [None if a is None else (a, a.data_ptr(), a._version, a.shape) for a in weights]
        weight_ih, weight_hh, *biases = (a.detach() for a in weights if a is not None)  # which hold on to the memory
        self.dtype, self.I, self.H = weight_ih.dtype, weight_ih.shape[1], weight_hh.shape[1]
        self.lanes = host.lanes_of(self.dtype)
        self.panels = host.panels_of(self.H, self.lanes)
        packed = weight_ih.new_empty(self.panels * (self.I + self.H + 1) * 4 * self.lanes)
        zeros = weight_ih.new_zeros(self.H)
        self.memory = weight_ih, weight_hh, biases, packed, zeros
        bias, bias_hh = [a.data_ptr() for a in biases] + [0] * (2 - len(biases))
        a, *_ = host.begin("ForwardArguments", packed, 1, 1, scratch=0)
        a.I, a.H, a.bias, a.bias_hh, a.packed = self.I, self.H, bias, bias_hh, packed.data_ptr()
        a.weight_ih, a.weight_ih_row = host.row(weight_ih)
        a.weight_hh, a.weight_hh_row = host.row(weight_hh)
        a.h_0 = a.c_0 = zeros.data_ptr()
        self.arguments = a
        tasks.run("forward", self.arguments, 1)  # of no steps and no rows: it only packs

    def is_of(self, weights: Sequence[Tensor | None]) -> bool:
        """True while these are the tensors that were packed, in the same memory and unchanged as far as is counted."""
        for a, key in zip(weights, self.keys):
            if a is None or key is None:
                if a is not None or key is not None:
                    return False
            elif (
                key[0] is not a
                or key[1] != a.data_ptr()
                or key[2] != a._version
                or key[3] != a.shape
                or not a.is_contiguous()
                or a.dtype is not self.dtype
            ):
                return False
        return True

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """``h`` (T, B, H), ``h_n`` and ``c_n`` (B, H) from ``x`` (T, B, I) and states (B, H), or None for zeros.

        None when the weights are found to have changed: they have to be packed again.
        """
        (T, B, _), H = x.shape, self.H
        threads, parts = host.split(B, H, self.I + H, self.panels)
        x = host.rows_contiguous(x)
        h, h_n, c_n = x.new_empty(T, B, H), x.new_empty(B, H), x.new_empty(B, H)
        a, memory, _ = host.refresh(self.arguments, x, threads, parts, scratch=7 * CHUNK * self.lanes)
        a.T, a.B, a.rows, a.reverse = T, B, B, reverse
        a.x, a.x_step, a.x_row = host.step_row(x)
        a.h, a.h_n, a.c, a.c_n = h.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), c_n.data_ptr()
        if hx is not None:
            h_0, c_0 = (host.rows_contiguous(state) for state in hx)
            a.h_0, a.h_0_row = host.row(h_0)
            a.c_0, a.c_0_row = host.row(c_0)
        stale = ctypes.c_int64()
        a.stale = ctypes.addressof(stale)
        tasks.run("forward", a, threads)
        del memory
        return None if stale.value else (h, h_n, c_n)
