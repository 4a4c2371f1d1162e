"""The forward kernel, for calls of one signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS, Layer, Run
from fastlstm.backends.cpu import LARGE
from fastlstm.backends.numba.constants import FEW_TRANSPOSED
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.addresses import stack_row_strides, stack_strides
from fastlstm.backends.numba.host.frames import Frame
from fastlstm.backends.numba.host.passes import NO_PRODUCTS, Pass
from fastlstm.backends.numba.host.signature import Signature
from fastlstm.backends.pool import new_of, pooled
from fastlstm.cells.spec import Cell

# What a part of a module reads and writes to: x, the output (T, B, D H) of its layer, and the last states (parts, B, H)
Shared = tuple[Tensor, Tensor, tuple[Tensor, ...]]


def saved_shape(
    cell: Cell, T: int, B: int, H: int, dtype: torch.dtype, stack_size: int | None = None
) -> tuple[int, ...]:
    """Return the shape of the saved gates, all saved values but states: (T, panels, B, G lanes), for each layer of a
    stack. A panel's rows lie side by side in a step. Values that all units of a row share fill a last panel.
    """
    lanes = sizes.lanes_of(dtype)
    panels, width = sizes.saved_panels(cell, H, lanes), cell.layout.saved_vectors(lanes) * lanes
    shape = T, panels, B if stack_size is None else B // stack_size, width
    return shape if stack_size is None else (stack_size, *shape)


class Forward(Pass):
    """Runs the forward kernel for calls of one signature. With `save`, a run returns the saved gates and the inner
    states of all steps; a single step returns states, and then h, only if the backward pass reads those after it. With
    `always_caches`, packed weights are cached even for a single step of large weights.
    """

    kind = "Forward"

    def __init__(
        self, signature: Signature, save: bool, caches: dict[Any, Any] | None = None, always_caches: bool = False,
        part: int = 0, directions: int = 1,
    ) -> None:  # fmt: skip
        """`part`, `directions`: of a module, which of its parts this is and in how many directions its layers run."""
        super().__init__(signature, caches, save)
        self.save, self.flip, s = save, 0, signature
        self.options = {"save": save, "part": part, "directions": directions}
        T, R, I, H, dtype, size, counts = s.T, s.rows, s.I, s.H, s.dtype, s.dtype.itemsize, s.counts
        x_components = sizes.input_components(s)
        fields, buffers = sizes.forward_sizes(s, x_components, self.team_count)
        # A single step reads each panel once. So a thread packs each panel into its cache just before the product. For
        # weights larger than the caches this takes a third of the time. Teams share the packed weights instead. For few
        # rows no panel is packed, if every panel is full and x has at least a vector's columns.
        L = self.lanes
        is_read_once = T == 1 and self.team_count == 1 and not (s.components or x_components or counts.products)
        can_skip_packing = s.stack_size is None and R <= FEW_TRANSPOSED and H // s.heads % L == 0 and L <= I
        is_in_place = is_read_once and can_skip_packing
        is_large = H * s.multiply_adds_per_unit * size > LARGE and not self.needs_cast
        may_cache = caches is not None and s.stack_size is None and not (is_read_once and is_large)
        caches_weights = always_caches or may_cache
        packed_panels = self.panels if caches_weights or not is_read_once else 0 if is_in_place else self.threads
        fields["packed_panels"] = packed_panels
        self.inner_states = range(1, counts.inner_states + 1)
        self.saves_states = save and (not s.is_single_step or counts.reads_new)
        if not self.saves_states:
            fields["inner_step_stride"] = 0
        count = sizes.packed_size(s, L, x_components, packed_panels)
        packed = {"packed": count, "biases": self.panels * counts.preacts * L}
        of_states = counts.h_preacts * H * (s.h_width // s.heads), counts.products * s.h_width * (H // s.heads)
        digested = counts.x_preacts * H * I, counts.x_preacts * H, counts.h_preacts * H, *of_states
        self.prepare(
            components=x_components, x_components=x_components, fields=fields, buffers=buffers, packed=packed,
            caches_weights=caches_weights, digested=digested, in_place=packed_panels == 0,
        )  # fmt: skip
        steps = () if s.is_single_step else (T,)
        self.new_states = [new_of(shape, dtype) for shape in self.state_shapes]
        self.new_h, self.new_sequence = (new_of((*steps, R, width), dtype) for width in (s.h_width, H))
        x_dtype = torch.bfloat16 if s.is_bfloat16 else dtype
        self.new_output = None if s.is_single_step else new_of((T, R, s.h_width), x_dtype)
        self.new_gates = new_of(saved_shape(s.cell, T, R, H, dtype, s.stack_size), dtype, pooled)
        width_bytes = s.h_width * s.kernel_element_bytes
        self.h_row_bytes, self.h_offset = directions * width_bytes, part % directions * width_bytes
        self.h_step_bytes = R * self.h_row_bytes
        count = WEIGHTS + counts.params + counts.products
        self.own_weights = slice(part * count, (part + 1) * count)
        self.h_n_offset, self.state_offset = part * R * self.h_0_row_bytes, part * R * self.state_row_bytes

    def run(self, layer: Layer, shared: Shared | None = None) -> Run:
        """Run a layer of this signature: `begin`, the kernel, and `end`."""
        frame = self.begin(layer, shared)
        self.run_frame(frame)
        return self.end(frame)

    def begin(self, layer: Layer, shared: Shared | None = None) -> Frame:
        """Return a frame for a layer of this signature. If x is bfloat16, h is too; states and saved values are
        float32. `layer`: the whole module, where this runs a part of one, and `shared`: the tensors of such a part.
        """
        x, weights, initial, lengths, reset = layer[:5]
        h_0, saves_states, offset, output = initial[0], self.saves_states, self.state_offset, None
        sequences: tuple[Tensor, ...] = ()
        h: Tensor | None
        if shared is not None:
            x, h, last = shared
            weights = weights[self.own_weights]
            h_n_address = last[0].data_ptr() + self.h_n_offset
            h_address = h.data_ptr() + self.h_offset
        else:
            last = tuple([new() for new in self.new_states])
            h_address = h_n_address = last[0].data_ptr()
            h = None
            if self.new_output is not None:
                h = self.new_output()
                h_address = h.data_ptr()
            elif saves_states:  # the backward pass gets its own h, since a user may change a step's h_n
                sequences = (self.new_h(),)
                h_address = sequences[0].data_ptr()
            elif self.signature.is_bfloat16:  # in h_n's memory, its rows would overwrite float32 rows of other threads
                output = x.new_empty(self.signature.rows, self.signature.H)
                h_address = output.data_ptr()
        h_0_address, h_0_row, row_stride = self.zeros_address, 0, 0
        if h_0 is not None:
            initial = tuple([a.contiguous() for a in initial])
            h_0_address = initial[0].data_ptr() + self.h_n_offset
            h_0_row, row_stride = self.h_0_row_bytes, self.state_row_bytes
        lengths_address = reset_address = gates_address = 0
        if lengths is not None:
            lengths = lengths.contiguous()
            lengths_address = lengths.data_ptr()
        if reset is not None:
            reset = reset.contiguous()
            reset_address = reset.data_ptr()
        gates: tuple[Tensor, ...] = ()
        if self.save:
            gates = (self.new_gates(),)
            gates_address = gates[0].data_ptr()
        self.flip ^= 1
        fields = [
            x.data_ptr(), h_0_address, h_0_row, lengths_address, reset_address, h_address, self.h_step_bytes,
            self.h_row_bytes, gates_address, h_n_address, self.flip,
        ]  # fmt: skip
        for k in self.inner_states:
            last_address = sequence_address = last[k].data_ptr() + offset
            if saves_states:
                sequence = self.new_sequence()
                sequence_address = sequence.data_ptr()
                sequences += (sequence,)
            initial_address = self.zeros_address if h_0 is None else initial[k].data_ptr() + offset
            fields += initial_address, row_stride, sequence_address, last_address
        operands: list[Tensor] = []
        if self.has_operands:
            field_values, operands = self.operand_fields(layer.inputs, weights)
            fields += field_values
        weights = weights[:WEIGHTS] + (self.product_weights(weights) if self.products else NO_PRODUCTS)
        results = Run(h, last, sequences + gates), layer, shared, (initial, lengths, reset, output, operands)
        frame = self.start(weights, fields, results)
        if self.stack_size > 1:
            output = last[0] if h is None else h
            frame.strides = self._stack_strides(weights, initial, output, (*sequences, *gates), last, operands)
        return frame

    def end(self, frame: Frame) -> Run:
        """Return the results of a frame that has run."""
        run: Run
        run, layer, shared, _ = frame.results
        if self.finish(frame):
            run = self.without_bf16_unit.run(layer, shared)
        return run

    def _stack_strides(
        self, weights: Any, initial: Any, h: Tensor, saved: Any, last: Any, operands: list[Tensor]
    ) -> dict[str, int]:
        """Return the stride of each address field from one stacked layer to the next."""
        s, rows = self.signature, {"h": h, "h_n": last[0], "h_0": initial[0]}
        # A single step saves h before the inner states. That shifts the pairs, but h has the strides of inner states.
        for k, (sequence, last_state) in enumerate(zip(saved if self.saves_states else last[1:], last[1:])):
            rows |= {f"sequence{k}": sequence, f"last{k}": last_state}
            rows |= {} if initial[0] is None else {f"initial{k}": initial[k + 1]}
        strides = s.input_stack_strides | stack_row_strides(s.B, **rows) | self.operand_stack_strides(operands)
        gates = saved[-1] if saved else None
        more = {"bias": weights[2], "bias_hh": weights[3], "weight_products": weights[4]}
        return strides | stack_strides(**more, gates=gates)
