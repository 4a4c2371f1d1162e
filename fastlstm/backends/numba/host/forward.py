"""The forward kernel, for calls of one signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS, Layer, Run, new_run
from fastlstm.backends.cpu import LARGE
from fastlstm.backends.numba.constants import FEW_TRANSPOSED
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.frames import Frame
from fastlstm.backends.numba.host.passes import Allocations, Binding, Pass
from fastlstm.backends.numba.host.signature import ZERO, Signature
from fastlstm.backends.pool import new_of, pooled
from fastlstm.cells.spec import Cell

# What a part of a module reads and writes to: x, the output (T, B, D H) of its layer, and its last states (parts, B, H)
Shared = tuple[Tensor, ...]


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
        s = signature
        self.options = {"save": save, "part": part, "directions": directions}
        T, R, I, H, dtype, size, counts = s.T, s.rows, s.I, s.H, s.dtype, s.dtype.itemsize, s.counts
        fields, buffers = sizes.forward_sizes(s)
        # A single step reads each panel once. So a thread packs each panel into its cache just before the product. For
        # weights larger than the caches this takes a third of the time. Teams share the packed weights instead. For few
        # rows only a last panel that is not full is packed, if x has at least a vector's columns.
        L = self.lanes
        is_read_once = T == 1 and self.team_count == 1 and not (s.components or counts.products)
        few_rows = FEW_TRANSPOSED if H % L == 0 else FEW_TRANSPOSED // 2
        has_whole_panels = s.heads == 1 or H // s.heads % L == 0  # of one head each
        can_skip_packing = s.stack_size is None and few_rows >= R and has_whole_panels and L <= I
        is_large = H * s.multiply_adds_per_unit * size > LARGE and not self.needs_cast
        may_cache = caches is not None and s.stack_size is None and not (is_read_once and is_large)
        caches_weights = always_caches or may_cache
        packed_panels, in_place_panels = self.panels, 0
        if is_read_once and not caches_weights:
            in_place_panels = H // L if can_skip_packing else 0
            packed_panels = self.panels - in_place_panels if in_place_panels > 0 else self.threads
        fields |= {"packed_panels": packed_panels, "in_place_panels": in_place_panels}
        self.saves_states = save and (not s.is_single_step or counts.reads_new)
        if not self.saves_states:
            fields["inner_step_stride"] = 0
        count = sizes.packed_size(s, L, packed_panels)
        packed = {"packed": count, "biases": self.panels * counts.preacts * L}
        of_states = counts.h_preacts * H * (s.h_width // s.heads), counts.products * s.h_width * (H // s.heads)
        digested = counts.x_preacts * H * I, counts.x_preacts * H, counts.h_preacts * H, *of_states
        self.prepare(
            fields=fields, buffers=buffers, packed=packed, caches_weights=caches_weights, digested=digested,
            in_place=in_place_panels > 0,
        )  # fmt: skip
        x_dtype, steps = torch.bfloat16 if s.is_bfloat16 else dtype, () if s.is_single_step else (T,)
        self.last = {f"last{k}": new_of(shape, dtype) for k, shape in enumerate(self.state_shapes)}
        # A part of a module has its output and its last states among those of the module. In h_n's memory, the bfloat16
        # rows of a step's h would overwrite float32 rows of other threads.
        self.output = {} if s.is_single_step else {"h": new_of((T, R, s.h_width), x_dtype)}
        self.unused = {"h": new_of((R, H), x_dtype)} if s.is_single_step and s.is_bfloat16 else {}
        self.saved: Allocations = {}
        if self.saves_states:
            # the backward pass gets its own h, since a user may change a step's h_n
            widths = {"h": s.h_width} if s.is_single_step else {}
            widths |= {f"sequence{k}": H for k in range(counts.inner_states)}
            for name, width in widths.items():
                self.saved[name] = new_of((*steps, R, width), x_dtype if name == "h" else dtype)
            self.unused = {}
        if save:
            self.saved["gates"] = new_of(saved_shape(s.cell, T, R, H, dtype, s.stack_size), dtype, pooled)
        # among the results of a call, which are the last states, the output, and what is saved
        self.states = len(self.last)
        self.first_saved = self.states + len(self.output)
        self.last_saved = self.first_saved + len(self.saved)
        self.bindings: dict[Any, Binding] = {}
        width_bytes = s.h_width * s.kernel_element_bytes
        self.h_row_bytes, self.h_offset = directions * width_bytes, part % directions * width_bytes
        count = WEIGHTS + counts.params + counts.products
        self.own_weights = slice(part * count, (part + 1) * count)
        self.h_n_offset, self.state_offset = part * R * self.h_0_row_bytes, part * R * self.state_row_bytes

    def run(self, layer: Layer, shared: Shared | None = None) -> Run:
        """Run a layer of this signature: `begin`, the kernel, and `end`."""
        frame = self.begin(layer, shared)
        if frame.is_written:
            frame.run()
        return self.end(frame)

    def begin(self, layer: Layer, shared: Shared | None = None) -> Frame:
        """Return a frame for a readable layer of this signature. If x is bfloat16, h is too; states and saved values
        are float32. `layer`: the whole module, where this runs a part of one, and `shared`: the tensors of such a part.
        """
        x, weights, initial, lengths, reset, _, _, inputs, *_ = layer
        outputs: tuple[Tensor, ...] = ()
        if shared is not None:
            x, outputs = shared[0], shared[1:]
            weights = weights[self.own_weights]
        if self.prepares_weights:
            weights = self.prepared(weights)
        operands = self.prototype, x, *weights, *initial, *inputs, lengths, reset, *outputs
        key = initial[0] is None, shared is None
        try:
            binding = self.bindings[key]
        except KeyError:
            binding = self.bindings[key] = self._bind(operands, shared is not None)
        return self.start(binding, operands, (layer, shared))

    def _bind(self, operands: Sequence[Any], is_part: bool) -> Binding:
        inner, states = range(self.signature.counts.inner_states), (*self.last,)
        allocations = self.saved if is_part else self.last | self.output | self.saved | self.unused
        h_n, state, h = (self.h_n_offset, self.state_offset, self.h_offset) if is_part else (0, 0, 0)
        sources = {
            "h": ("h", h) if is_part or "h" in allocations else ("last0", 0),
            "h_step_stride": (ZERO, self.signature.rows * self.h_row_bytes),
            "h_row_stride": (ZERO, self.h_row_bytes),
            "gates": ("gates", 0),
            "h_n": ("last0", h_n),
        }
        for k in inner:
            sources[f"last{k}"] = f"last{k + 1}", state
            sources[f"sequence{k}"] = (f"sequence{k}", 0) if self.saves_states else sources[f"last{k}"]
        return self.bind(operands, ("h", *states) if is_part else (), allocations, sources, h_n, state)

    def end(self, frame: Frame) -> Run:
        """Return the results of a frame that has run."""
        _, _, results, (layer, shared), *_ = frame.call
        if self.finish(frame):
            run: Run = self.without_bf16_unit.run(layer, shared)
            return run
        if shared is not None:
            return new_run((shared[1], shared[2:], tuple(results)))
        first, last = self.first_saved, self.last_saved
        return new_run(
            (results[first - 1] if self.output else None, tuple(results[: self.states]), tuple(results[first:last]))
        )
