"""The forward kernel, for calls of one signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Layer, Run
from fastlstm.backends.cpu import LARGE
from fastlstm.backends.memory import new_of, pooled
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.passes import Pass
from fastlstm.backends.numba.host.signature import Signature


def saved_shape(cell: Any, T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Shape of the gates kept for the backward pass: for each panel of units its rows side by side, as both passes read
    them, and of a stack's groups one after the other.
    """
    lanes = sizes.lanes_of(dtype)
    shape = T, sizes.panels_of(H, lanes), B if groups is None else B // groups, 4 * lanes
    return shape if groups is None else (groups, *shape)


class Forward(Pass):
    """The forward kernel. With `save` runs keep what the backward pass reads."""

    kind = "Forward"

    def __init__(self, signature: Signature, save: bool, kept: dict[Any, Any] | None = None) -> None:
        super().__init__(signature, kept)
        self.save, self.options, self.flip, s = save, (save,), 0, signature
        T, B, R, I, H, dtype, size = s.T, s.B, s.rows, s.I, s.H, s.dtype, s.dtype.itemsize
        of_x, (threads, parts) = sizes.input_pieces(I, H, dtype, s.pieces, s.unit), self.split(back=False)
        fields, buffers = sizes.forward_sizes(s, of_x, parts)
        # One step reads every panel once: a thread packs it into memory that stays in its cache, in a third of the time
        # where the weights are larger than the caches. Parts of the batch rows share the packed weights instead.
        once = T == 1 and parts == 1 and not (s.pieces or of_x)
        large = 4 * H * (I + H) * size > LARGE and s.given is dtype and not save
        keeps = kept is not None and s.groups is None and not (once and large)
        fields["places"] = places = threads if once and not keeps else self.panels
        fields["h_step"], fields["h_row"] = (B if s.narrow else R) * self.row, self.row
        fields["out_step"], fields["out_row"] = R * H * 2, H * 2
        fields["c_step"] = R * self.row if save and not s.step else 0
        count = sizes.packed_size(I, H, self.lanes, s.pieces, of_x, places)
        packed = {"packed": count, "biases": self.panels * 4 * self.lanes}
        task, digested = sizes.forward_task(s.pieces, of_x), (I, 1, 1, H)
        self.prepare(task, of_x, of_x, threads, parts, fields, buffers, packed, keeps, digested)
        self.new = new_of(self.like, (T, R, H))
        self.outputs: Any = None if s.step else (T, R, H)
        self.gates = saved_shape(None, T, R, H, dtype, s.groups)

    def run(self, layer: Layer) -> Run:
        """A layer of this signature; where x is ``narrow`` h is, too, and the states and what is kept are float32."""
        given: Any = layer
        x, weights, (h_0, c_0), lengths, reset, *_ = given
        new, states = self.like.new_empty, self.states
        h_n, c_n = new(*states), new(*states)  # by a tuple it would take half as long again
        of_h, of_c, of_gates = h_n.data_ptr(), c_n.data_ptr(), 0
        of_last, h = (of_h, of_c), None
        kept: tuple[Tensor, ...] = ()
        if self.outputs is not None:
            h = self.new(x, *self.outputs)
            of_h = h.data_ptr()
        elif self.signature.narrow:  # its rows of bfloat16 would lie over those of h_n that other threads have left
            output = x.new_empty(self.signature.rows, self.signature.H)
            of_h = output.data_ptr()
        if self.save:
            kept = (pooled(self.like, *self.gates),)
            of_gates = kept[0].data_ptr()
            if self.outputs is not None:
                kept = self.new(self.like, *self.outputs), *kept
                of_c = kept[0].data_ptr()
        of_h_0 = of_c_0 = self.zeros
        row_h = row_c = of_lengths = of_reset = 0
        if h_0 is not None:
            row_h = row_c = self.row
            if not (h_0.is_contiguous() and c_0.is_contiguous()):
                (h_0, row_h), (c_0, row_c) = self.given(h_0), self.given(c_0)
            of_h_0, of_c_0 = h_0.data_ptr(), c_0.data_ptr()
        if lengths is not None:
            lengths = lengths.contiguous()
            of_lengths = lengths.data_ptr()
        if reset is not None:
            reset = reset.contiguous()
            of_reset = reset.data_ptr()
        self.flip ^= 1
        call = (
            x.data_ptr(), of_h_0, row_h, of_c_0, row_c, of_lengths, of_reset, of_h, of_c, of_gates, *of_last, self.flip
        )  # fmt: skip
        by_group = None
        if self.groups > 1:
            s, (_, _, bias, bias_hh) = self.signature, weights
            of_rows = sizes.row_steps(s.B, h_0=h_0, c_0=c_0, h=c_n if h is None else h, c=c_n, h_n=h_n, c_n=c_n)
            of_weights = sizes.first_steps(bias=bias, bias_hh=bias_hh, gates=kept[-1] if kept else None)
            by_group = s.group_strides | of_rows | of_weights
        if self.enter(weights, call, by_group):
            found: Run = self.without_unit.run(layer)
            return found
        return Run(h, (h_n, c_n), kept)
