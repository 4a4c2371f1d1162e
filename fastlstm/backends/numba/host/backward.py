"""The backward kernel, for calls of one signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS, Gradients, Layer, Run
from fastlstm.backends.cpu import LARGE, address, rows_contiguous
from fastlstm.backends.numba.constants import FEW_IN_PLACE
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.addresses import (
    address_and_row_stride,
    address_and_strides,
    stack_row_strides,
    stack_strides,
)
from fastlstm.backends.numba.host.frames import Frame
from fastlstm.backends.numba.host.passes import NO_PRODUCTS, Pass
from fastlstm.backends.numba.host.signature import Signature, contiguous
from fastlstm.backends.pool import new_of


class Backward(Pass):
    """Runs the backward kernel for calls of one signature and one set of wanted gradients."""

    kind = "Backward"

    def __init__(
        self, signature: Signature, needs: Gradients, stacked_gates: bool, caches: dict[Any, Any] | None = None
    ) -> None:
        """`stacked_gates`: whether the saved gates are those of a stack (groups, T, ...), not of one layer (T, ...)."""
        super().__init__(signature, caches)
        self.needs, self.stacked_gates, s = needs, stacked_gates, signature
        self.options = {"needs": needs, "stacked_gates": stacked_gates}
        T, B, R, I, H, counts, dtype = s.T, s.B, s.rows, s.I, s.H, s.counts, s.dtype
        wants_dx, multiplies_hh = needs.x and counts.x_preacts > 0, counts.h_preacts > 0 and (T > 1 or needs.states[0])
        wants_weights = any(needs.weights)
        fields, buffers, dx_components, sum_components = sizes.backward_sizes(s, wants_weights, wants_dx)
        # A single step reads each weight once. The weights are read unpacked for one row, or for few rows if they are
        # large. H, and I if dx is wanted, must then be multiples of the lanes.
        is_full = H % self.lanes == 0 and (I % self.lanes == 0 or not wants_dx)
        is_few = R == 1 or (R <= FEW_IN_PLACE and H * s.multiply_adds_per_unit * dtype.itemsize > LARGE)
        uses_bf16_unit = s.components or dx_components or sum_components
        is_special = s.stack_size or uses_bf16_unit or self.needs_cast or s.heads > 1 or counts.products
        in_place = T == 1 and is_few and is_full and not is_special
        reads = {"packed_hh": multiplies_hh and not in_place, "packed_ih": wants_dx and not in_place}
        reads["packed_products"] = counts.products > 0
        packs = any(reads.values())
        fields["gate_rows"] = B if stacked_gates else R
        x_components = s.components or dx_components  # the cache holds weight_ih even if this call does not read it
        transposed = sizes.transposed_sizes(s, self.panels, self.lanes, x_components)
        caches_weights = caches is not None and s.stack_size is None and packs
        packed = {name: transposed[name] for name, is_read in reads.items() if caches_weights or is_read}
        of_products = counts.products * s.h_width * (H // s.heads)
        digested = counts.x_preacts * H * I, counts.h_preacts * H * (s.h_width // s.heads), of_products
        self.prepare(
            components=dx_components or sum_components, x_components=x_components, fields=fields, buffers=buffers,
            packed=packed, caches_weights=caches_weights, digested=digested, in_place=in_place,
        )  # fmt: skip
        stack = () if s.stack_size is None else (s.stack_size,)
        weight_dtype = torch.bfloat16 if s.is_bfloat16 else dtype
        x_rows, h_rows = counts.x_preacts * H, counts.h_preacts * H
        shapes: Any = (
            (R, I) if s.is_single_step else (T, R, I), (*stack, x_rows, I), (*stack, h_rows, s.h_width // s.heads),
            (*stack, x_rows), (*stack, h_rows), *[(*stack, H)] * counts.params,
            *[(*stack, s.h_width, H // s.heads)] * counts.products,
            *self.state_shapes, *[(T, R, H)] * counts.inputs,
        )  # fmt: skip
        self.inner_states = range(1, counts.inner_states + 1)
        self.first_state = WEIGHTS + 1 + counts.params + counts.products  # index of dh_0 among the gradients
        # of params, then of products as kernels have them
        self.vectors = *range(WEIGHTS + 1, WEIGHTS + 1 + counts.params), *(1 + k for k in self.products)
        wanted = wants_dx, *needs.weights, *needs.states, *needs.inputs
        self.allocations = [
            # the first three are dx, dweight_ih and dweight_hh
            new_of(shape, weight_dtype if k < 3 else dtype) if want else None
            for k, (want, shape) in enumerate(zip(wanted, shapes))
        ]

    def run(self, grads: Run, layer: Layer, run: Run) -> Gradients:
        """Return the wanted gradients of a layer: `begin`, the kernel, and `end`."""
        frame = self.begin(grads, layer, run)
        self.run_frame(frame)
        return self.end(frame)

    def begin(self, grads: Run, layer: Layer, run: Run) -> Frame:
        """Return a frame for the backward pass of a layer. dh, dx and weight gradients are bfloat16 if x is."""
        x, weights, initial, lengths, reset, *_ = layer
        initial = (*map(contiguous, initial),)
        h, h_0, zeros, dh, (*sequences, gates) = (
            run.h, initial[0], self.zeros_address, grads.h, map(contiguous, run.saved),
        )  # fmt: skip
        if self.signature.is_single_step and sequences:
            h, *sequences = sequences
        h_fields = 0, 0, 0
        if h is not None:
            h = rows_contiguous(h)
            h_fields = h.data_ptr(), 0 if h.dim() == 2 else h.stride(0) * h.itemsize, h.stride(-2) * h.itemsize
        gradients = [new if new is None else new() for new in self.allocations]
        addresses = [0 if a is None else a.data_ptr() for a in gradients]
        first_state, d_last, d_sequences = self.first_state, [grads.last[0]], []
        h_0_address, h_0_row, row_stride, dh_fields, dh_n_fields = zeros, 0, 0, (zeros, 0, 0), (0, 0)
        if h_0 is not None:
            h_0_address, h_0_row, row_stride = h_0.data_ptr(), self.h_0_row_bytes, self.state_row_bytes
        if dh is not None:
            dh = rows_contiguous(dh)
            dh_fields = address_and_strides(dh)
        if d_last[0] is not None:
            d_last[0] = rows_contiguous(d_last[0])
            dh_n_fields = address_and_row_stride(d_last[0])
        lengths, reset = contiguous(lengths), contiguous(reset)
        fields = [
            x.data_ptr(), h_0_address, h_0_row, address(lengths), address(reset), *h_fields, address(gates),
            *dh_fields, *dh_n_fields, *addresses[: WEIGHTS + 1], addresses[first_state],
        ]  # fmt: skip
        for k in self.inner_states:
            d_sequence, d_state = grads.saved[k - 1] if grads.saved else None, grads.last[k]
            fields += zeros if h_0 is None else initial[k].data_ptr(), row_stride
            fields.append(sequences[k - 1].data_ptr() if sequences else 0)  # absent where a single step needs none
            if d_sequence is None:
                fields += 0, 0, 0
            else:
                d_sequence = rows_contiguous(d_sequence)
                fields += address_and_strides(d_sequence)
            if d_state is None:
                fields += 0, 0
            else:
                d_state = rows_contiguous(d_state)
                fields += address_and_row_stride(d_state)
            fields.append(addresses[first_state + k])
            d_sequences.append(d_sequence)
            d_last.append(d_state)
        operands: list[Tensor] = []
        products = self.product_weights(weights) if self.products else NO_PRODUCTS
        if self.has_operands:
            field_values, operands = self.operand_fields(layer.inputs, weights, 0)
            inputs = len(layer.inputs)
            # an input has four fields: its address, two strides, and the address of its gradient
            field_values[3 : 4 * inputs : 4] = addresses[len(addresses) - inputs :]
            fields += field_values
        fields += [addresses[k] for k in self.vectors]
        incoming = (dh, *d_sequences), d_last
        kept = initial, lengths, reset, h, sequences, gates, incoming, operands
        frame = self.start((*weights[:2], None, None, *products), fields, (gradients, (grads, layer, run), kept))
        if self.stack_size > 1:
            frame.strides = self._stack_strides(operands, initial, (h, *sequences), gates, *incoming, gradients)
            frame.strides |= stack_strides(weight_products=products[0])
        return frame

    def end(self, frame: Frame) -> Gradients:
        """Return the gradients of a frame that has run."""
        gradients, arguments, _ = frame.results
        if self.finish(frame):
            without_unit: Gradients = self.without_bf16_unit.run(*arguments)
            return without_unit
        _, layer, _ = arguments
        x, weights, initial, *_ = layer
        first_state = self.first_state
        dx, *dweights = gradients[:first_state]
        for k in (2, 3):
            if weights[k] is None:
                dweights[k] = None
        if dx is None and self.needs.x:  # a cell may multiply no x
            dx = torch.zeros_like(x if x.dim() < 4 else x.flatten(1, 2))
        first_input = first_state + len(initial)
        return Gradients(dx, (*dweights,), (*gradients[first_state:first_input],), (*gradients[first_input:],))

    def _stack_strides(
        self, operands: list[Tensor], initial: Any, sequences: Any, gates: Any, d_sequences: Any, d_last: Any,
        gradients: Any,
    ) -> dict[str, int]:  # fmt: skip
        """Return the stride of each address field from one stacked layer to the next."""
        s, counts, first_state = self.signature, self.signature.counts, self.first_state
        weights = dict(zip(("dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh"), gradients[1:]))
        weights |= {f"dparam{k}": gradients[index] for k, index in enumerate(self.vectors)}
        rows = {"dx": gradients[0], "h": sequences[0], "h_0": initial[0]}
        rows |= {"dh": d_sequences[0], "dh_n": d_last[0], "dh_0": gradients[first_state]}
        for k in range(counts.inner_states):
            rows |= {f"initial{k}": initial[k + 1], f"sequence{k}": sequences[k + 1]}
            rows |= {f"d_sequence{k}": d_sequences[k + 1], f"d_last{k}": d_last[k + 1]}
            rows[f"d_initial{k}"] = gradients[first_state + k + 1]
        rows |= {f"d_operand{k}": a for k, a in enumerate(gradients[first_state + counts.inner_states + 1 :])}
        (weights if self.stacked_gates else rows)["gates"] = gates
        strides = s.input_stack_strides | stack_row_strides(s.B, **rows) | stack_strides(**weights)
        return strides | self.operand_stack_strides(operands)
