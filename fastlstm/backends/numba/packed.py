"""Weights packed once and kept between calls, with the arguments of a call made ready."""

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastlstm.backends.memory import empty
from fastlstm.backends.numba import host, tasks
from fastlstm.backends.numba.shared import CHUNK


class PackedLayer:
    """One layer's weights as the kernels read them.

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
        packed = empty(weight_ih, self.panels * (self.I + self.H + 1) * 4 * self.lanes)
        zeros = weight_ih.new_zeros(self.H)
        self.memory = weight_ih, weight_hh, biases, packed, zeros
        bias, bias_hh = [a.data_ptr() for a in biases] + [0] * (2 - len(biases))
        a, *_ = host.begin("ForwardArguments", packed, 1, 1, scratch=0)
        a.I, a.H, a.bias, a.bias_hh, a.packed = self.I, self.H, bias, bias_hh, packed.data_ptr()
        a.weight_ih, a.weight_ih_row = host.row(weight_ih)
        a.weight_hh, a.weight_hh_row = host.row(weight_hh)
        a.h_0 = a.c_0 = zeros.data_ptr()
        self.arguments = a
        self._run("forward", a)  # of no steps and no rows: it only packs
        self.transposed: Any = None
        self.stale = False
        self.calls = 0

    def _run(self, name: str, arguments: Any) -> None:
        threads = host.split(1, self.H, self.I + self.H, self.panels)[0]
        a, _memory, _ = host.refresh(arguments, self.memory[0], threads, 1, scratch=0)
        tasks.run(name, a, threads)

    def transpose(self) -> Any:
        """Arguments of the backward kernel with the transposed weights packed, for the products with dpreact."""
        if self.transposed is None:
            weight_ih, weight_hh, *_ = self.memory
            sizes = host.transposed_sizes(self.I, self.H, self.panels, self.lanes)
            a, memory, _ = host.begin("BackwardArguments", weight_ih, 1, 1, scratch=0, **sizes)
            a.I, a.H, a.chunk, a.ring, a.packs = self.I, self.H, 1, 1, 1
            a.weight_ih, a.weight_ih_row = host.row(weight_ih)
            a.weight_hh, a.weight_hh_row = host.row(weight_hh)
            self._run("backward", a)
            a.packs = 0
            self.transposed = a, memory  # complete: another thread may have made its own by now
        return self.transposed[0]

    def is_of(self, weights: Sequence[Tensor | None]) -> bool:
        """True while these are the tensors that were packed, in the same memory and unchanged as far as is counted."""
        if self.stale:
            return False
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

    def _call(self, like: Tensor, B: int) -> tuple[Any, Tensor, int]:
        """Arguments of the forward kernel for B rows, what keeps their memory alive, and how many threads to run."""
        threads, parts = host.split(B, self.H, self.I + self.H, self.panels)
        a, memory, _ = host.refresh(self.arguments, like, threads, parts, scratch=7 * CHUNK * self.lanes)
        a.B = a.rows = B
        self.calls += 1
        a.flip = self.calls % 2
        return a, memory, threads

    def _run_call(self, a: Any, threads: int) -> bool:
        """Run the forward kernel; False when it finds that the weights have changed."""
        stale = ctypes.c_int64()
        a.stale = ctypes.addressof(stale)
        tasks.run("forward", a, threads)
        self.stale = self.stale or stale.value != 0
        return not stale.value

    def forward(
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None, reverse: bool, save: bool = False
    ) -> tuple[Tensor, ...] | None:
        """``h`` (T, B, H), ``h_n`` and ``c_n`` (B, H) from ``x`` (T, B, I) and states (B, H), or None for zeros; with
        `save` also ``c`` (T, B, H) and the gates.

        None when the weights are found to have changed: they have to be packed again.
        """
        (T, B, _), H = x.shape, self.H
        x = host.rows_contiguous(x)
        h, h_n, c_n = x.new_empty(T, B, H), x.new_empty(B, H), x.new_empty(B, H)
        a, _memory, threads = self._call(x, B)
        a.T, a.reverse = T, reverse
        a.x, a.x_step, a.x_row = host.step_row(x)
        a.h, a.h_n, a.c, a.c_n = h.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), c_n.data_ptr()
        saved: tuple[Tensor, ...] = ()
        if save:
            c, gates = saved = empty(x, T, B, H), empty(x, T, self.panels, B, 4 * self.lanes)
            a.c, a.c_step, a.gates = c.data_ptr(), B * H * x.element_size(), gates.data_ptr()
        if hx is not None:
            h_0, c_0 = (host.rows_contiguous(state) for state in hx)
            a.h_0, a.h_0_row = host.row(h_0)
            a.c_0, a.c_0_row = host.row(c_0)
        return (h, h_n, c_n, *saved) if self._run_call(a, threads) else None

    def step(self, x: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor] | None:
        """``h`` and ``c`` (B, H) from ``x`` (B, I) and states (B, H), or None as from `forward`."""
        B = x.shape[0]
        x, h_0, c_0 = host.rows_contiguous(x), host.rows_contiguous(h_0), host.rows_contiguous(c_0)
        h, c = x.new_empty(B, self.H), x.new_empty(B, self.H)
        a, _memory, threads = self._call(x, B)
        a.T = 1
        a.x, a.x_row = host.row(x)
        a.h_0, a.h_0_row = host.row(h_0)
        a.c_0, a.c_0_row = host.row(c_0)
        a.h = a.h_n = h.data_ptr()
        a.c = a.c_n = c.data_ptr()
        return (h, c) if self._run_call(a, threads) else None
