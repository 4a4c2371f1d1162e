"""The forward kernel, for calls of one signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS, Layer, Run
from fastlstm.backends.cpu import LARGE
from fastlstm.backends.memory import new_of, pooled
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.passes import Pass
from fastlstm.backends.numba.host.signature import Signature
from fastlstm.cells.spec import Cell


def saved_shape(cell: Cell, T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Shape of what is kept for the backward pass beside the states: for each panel of units its rows side by side, as
    both passes read them, and of a stack's groups one after the other.
    """
    lanes = sizes.lanes_of(dtype)
    shape = T, sizes.panels_of(H, lanes), B if groups is None else B // groups, len(cell.layout.saved) * lanes
    return shape if groups is None else (groups, *shape)


class Forward(Pass):
    """The forward kernel. With `save` runs keep what the backward pass reads: the states but the first and gates. A
    single step keeps states only if the backward pass reads them, and then all.
    """

    kind = "Forward"

    def __init__(self, signature: Signature, save: bool, kept: dict[Any, Any] | None = None) -> None:
        super().__init__(signature, kept)
        self.save, self.options, self.flip, s = save, (save,), 0, signature
        T, B, R, I, H, dtype, size, counts = s.T, s.B, s.rows, s.I, s.H, s.dtype, s.dtype.itemsize, s.counts
        of_x, (threads, parts) = sizes.input_pieces(s), self.split(back=False)
        fields, buffers = sizes.forward_sizes(s, of_x, parts)
        # One step reads every panel once: a thread packs it into memory that stays in its cache, in a third of the time
        # where the weights are larger than the caches. Parts of the batch rows share the packed weights instead.
        once = T == 1 and parts == 1 and not (s.pieces or of_x)
        large = H * s.products * size > LARGE and s.given is dtype and not save
        keeps = kept is not None and s.groups is None and not (once and large)
        fields["places"] = places = threads if once and not keeps else self.panels
        fields["h_step"], fields["h_row"] = (B if s.narrow else R) * self.row, self.row
        fields["out_step"], fields["out_row"] = R * H * 2, H * 2
        self.keeps_states = save and (not s.step or counts.reads_new)
        if not self.keeps_states:
            fields["c_step"] = 0
        count = sizes.packed_size(s, self.lanes, of_x, places)
        packed = {"packed": count, "biases": self.panels * counts.sums * self.lanes}
        digested = counts.of_x * H * I, counts.of_x * H, counts.of_h * H, counts.of_h * H * H
        task = sizes.forward_task(s.pieces, of_x)
        self.prepare(task, of_x, of_x, threads, parts, fields, buffers, packed, keeps, digested)
        self.new = new_of(self.like, (T, R, H))
        self.shape = (R, H) if s.step else (T, R, H)
        self.outputs = None if s.step else self.shape
        self.gates = saved_shape(s.cell, T, R, H, dtype, s.groups)

    def run(self, layer: Layer) -> Run:
        """A layer of this signature; where x is ``narrow`` h is, too, and the states and what is kept are float32."""
        x, weights, starts, lengths, reset, *_ = layer
        new, states, step = self.like.new_empty, self.states, self.signature.step
        last = [new(*states) for _ in starts]  # by a tuple it would take half as long again
        steps, of_gates, of_lengths, of_reset, kept = [*last], 0, 0, 0, ()
        if self.outputs is not None:
            steps[0] = self.new(x, *self.outputs)
        elif self.signature.narrow:  # its rows of bfloat16 would lie over those of h_n that other threads have left
            steps[0] = x.new_empty(self.signature.rows, self.signature.H)
        if self.save:
            gates = pooled(self.like, *self.gates)
            of_gates, kept = gates.data_ptr(), (gates,)
            if self.keeps_states:
                first = 0 if step else 1  # a step has no other h
                steps[first:] = [self.new(self.like, *self.shape) for _ in last[first:]]
                kept = *steps[first:], gates
        if starts[0] is None:
            at = [(self.zeros, 0)] * len(last)
        else:
            given = [self.given(a) for a in starts]
            at = [(a.data_ptr(), row) for a, row in given]
        if lengths is not None:
            lengths = lengths.contiguous()
            of_lengths = lengths.data_ptr()
        if reset is not None:
            reset = reset.contiguous()
            of_reset = reset.data_ptr()
        self.flip ^= 1
        call = [
            x.data_ptr(), *at[0], of_lengths, of_reset, steps[0].data_ptr(), of_gates, last[0].data_ptr(), self.flip
        ]  # fmt: skip
        for k in range(1, len(last)):
            call += *at[k], steps[k].data_ptr(), last[k].data_ptr()
        values: list[Tensor] = []
        if self.has_values:
            told, values = self.values(layer)
            call += told
        by_group = None
        if self.groups > 1:
            s, (_, _, bias, bias_hh, *_) = self.signature, weights
            of_rows = {"h": steps[0], "h_n": last[0]}
            if starts[0] is not None:
                of_rows |= {"h_0": given[0][0], **{f"start{k}": a for k, (a, _) in enumerate(given[1:])}}
            for k in range(len(last) - 1):
                of_rows |= {f"steps{k}": steps[k + 1], f"last{k}": last[k + 1]}
            of_weights = sizes.first_steps(bias=bias, bias_hh=bias_hh, gates=kept[-1] if kept else None)
            by_group = s.group_strides | sizes.row_steps(s.B, **of_rows) | of_weights | self.values_by_group(values)
        if self.enter(weights[:WEIGHTS], call, by_group):
            found: Run = self.without_unit.run(layer)
            return found
        return Run(None if step else steps[0], (*last,), kept)
