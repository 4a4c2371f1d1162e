"""The forward kernel, for calls of one signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS, Layer, Run
from fastlstm.backends.cpu import LARGE
from fastlstm.backends.memory import new_of, pooled
from fastlstm.backends.numba.constants import FEW_TRANSPOSED
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.passes import Pass
from fastlstm.backends.numba.host.signature import Signature
from fastlstm.cells.spec import Cell


def saved_shape(cell: Cell, T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Return the shape of what is saved for the backward pass beside the states: (T, panels, B, G lanes).

    Each step has for each panel of units its rows side by side, as both passes read them. The numbers that a row's
    units share are those of a last panel. Stacked layers follow each other.
    """
    lanes = sizes.lanes_of(dtype)
    panels, width = sizes.saved_panels(cell, H, lanes), cell.layout.saved_vectors(lanes) * lanes
    shape = T, panels, B if groups is None else B // groups, width
    return shape if groups is None else (groups, *shape)


class Forward(Pass):
    """The forward kernel. With `save` runs keep what the backward pass reads: the states but the first and gates. A
    single step keeps states only if the backward pass reads them, and then all. If it `holds` weights they stay packed
    whatever it costs to compare them.
    """

    kind = "Forward"

    def __init__(
        self, signature: Signature, save: bool, kept: dict[Any, Any] | None = None, holds: bool = False
    ) -> None:
        super().__init__(signature, kept)
        self.save, self.options, self.flip, s = save, (save,), 0, signature
        T, B, R, I, H, dtype, size, counts = s.T, s.B, s.rows, s.I, s.H, s.dtype, s.dtype.itemsize, s.counts
        of_x, (threads, team_count) = sizes.input_pieces(s), self.split(back=False)
        fields, buffers = sizes.forward_sizes(s, of_x, team_count)
        # One step reads every panel once: a thread packs it into memory that stays in its cache, in a third of the time
        # where the weights are larger than the caches. Parts of the batch rows share the packed weights instead. The
        # panels of few rows are not packed at all, if every panel is full and x has at least a vector's columns.
        once, L = T == 1 and team_count == 1 and not (s.pieces or of_x), self.lanes
        in_place = once and s.groups is None and R <= FEW_TRANSPOSED and H // s.heads % L == 0 and L <= I
        large = H * s.products * size > LARGE and not self.casts
        keeps = holds or (kept is not None and s.groups is None and not (once and large))
        places = self.panels if keeps or not once else 0 if in_place else threads
        fields["places"] = places
        fields["h_step"], fields["h_row"] = (B if s.narrow else R) * self.row, self.row
        fields["out_step"], fields["out_row"] = R * H * 2, H * 2
        self.others = range(1, counts.others + 1)
        self.keeps_states = save and (not s.step or counts.reads_new)
        if not self.keeps_states:
            fields["c_step"] = 0
        count = sizes.packed_size(s, self.lanes, of_x, places)
        packed = {"packed": count, "biases": self.panels * counts.sums * self.lanes}
        digested = counts.of_x * H * I, counts.of_x * H, counts.of_h * H, counts.of_h * H * (H // s.heads)
        self.prepare(of_x, of_x, threads, team_count, fields, buffers, packed, keeps, digested, places == 0)
        self.new = new_of(self.like, (T, R, H))
        self.shape = (R, H) if s.step else (T, R, H)
        self.outputs = None if s.step else self.shape
        self.gates = saved_shape(s.cell, T, R, H, dtype, s.groups)

    def run(self, layer: Layer) -> Run:
        """A layer of this signature; where x is ``narrow`` h is, too, and the states and what is kept are float32."""
        x, weights, starts, lengths, reset, *_ = layer
        new, states, first, keeps, of_gates = self.like.new_empty, self.states, starts[0], self.keeps_states, 0
        h_n, h = new(*states), None  # by a tuple it would take half as long again
        last: tuple[Tensor, ...] = (h_n,)
        steps: tuple[Tensor, ...] = ()
        gates: tuple[Tensor, ...] = ()
        of_h = of_last = h_n.data_ptr()
        if self.outputs is not None:
            h = self.new(x, *self.outputs)
            of_h = h.data_ptr()
        elif keeps:  # a step has no other h that stays as it is
            steps = (self.new(self.like, *self.shape),)
            of_h = steps[0].data_ptr()
        elif self.signature.narrow:  # its rows of bfloat16 would lie over those of h_n that other threads have left
            output = x.new_empty(self.signature.rows, self.signature.H)
            of_h = output.data_ptr()
        of_first, row = self.zeros, 0
        if first is not None:
            starts = (*[a.contiguous() for a in starts],)
            of_first, row = starts[0].data_ptr(), self.row
        if self.save:
            gates = (pooled(self.like, *self.gates),)
            of_gates = gates[0].data_ptr()
        of_lengths = of_reset = 0
        if lengths is not None:
            lengths = lengths.contiguous()
            of_lengths = lengths.data_ptr()
        if reset is not None:
            reset = reset.contiguous()
            of_reset = reset.data_ptr()
        self.flip ^= 1
        call = [x.data_ptr(), of_first, row, of_lengths, of_reset, of_h, of_gates, of_last, self.flip]
        for k in self.others:
            end = new(*states)
            of_end = of_steps = end.data_ptr()
            last += (end,)
            if keeps:
                to = self.new(self.like, *self.shape)
                of_steps = to.data_ptr()
                steps += (to,)
            call += self.zeros if first is None else starts[k].data_ptr(), row, of_steps, of_end
        values: list[Tensor] = []
        if self.has_values:
            told, values = self.values(layer)
            weights = weights[:WEIGHTS]
            call += told
        by_group = None
        if self.groups > 1:
            by_group = self._by_group(weights, starts, h_n if h is None else h, (*steps, *gates), last, values)
        if self.enter(weights, call, by_group):
            found: Run = self.without_unit.run(layer)
            return found
        return Run(h, last, steps + gates)

    def _by_group(self, weights: Any, starts: Any, h: Tensor, kept: Any, last: Any, values: list[Tensor]) -> Any:
        """Bytes from what is one group's to what is the next one's."""
        s, rows = self.signature, {"h": h, "h_n": last[0], "h_0": starts[0]}
        for k, (to, end) in enumerate(zip(kept if self.keeps_states else last[1:], last[1:])):
            rows |= {f"steps{k}": to, f"last{k}": end}
            rows |= {} if starts[0] is None else {f"start{k}": starts[k + 1]}
        found = s.group_strides | sizes.row_steps(s.B, **rows) | self.values_by_group(values)
        return found | sizes.first_steps(bias=weights[2], bias_hh=weights[3], gates=kept[-1] if kept else None)
