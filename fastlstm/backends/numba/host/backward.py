"""The backward kernel, for calls of one signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlstm.backends.base import Gradients, Layer, Run, new_gradients
from fastlstm.backends.cpu import LARGE
from fastlstm.backends.numba.constants import FEW_IN_PLACE
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.frames import Frame
from fastlstm.backends.numba.host.passes import Binding, Pass
from fastlstm.backends.numba.host.signature import ZERO, Signature, contiguous, with_rows
from fastlstm.backends.pool import new_of

MOST_BINDINGS = 64  # of one kernel, for gradients that lie in one way or another


class Backward(Pass):
    """Runs the backward kernel for calls of one signature and one set of wanted gradients."""

    kind = "Backward"

    def __init__(
        self, signature: Signature, needs: Gradients, stacked_gates: bool, caches: dict[Any, Any] | None = None,
        accumulates: bool = False,
    ) -> None:  # fmt: skip
        """`stacked_gates`: whether the saved gates are those of a stack (groups, T, ...), not of one layer (T, ...).
        `accumulates`: whether calls add the gradients of weights to tensors that they get.
        """
        super().__init__(signature, caches)
        self.needs, self.stacked_gates, s = needs, stacked_gates, signature
        self.options = {"needs": needs, "stacked_gates": stacked_gates}
        T, B, R, I, H, counts, dtype = s.T, s.B, s.rows, s.I, s.H, s.counts, s.dtype
        wants_dx, multiplies_hh = needs.x and counts.x_preacts > 0, counts.h_preacts > 0 and (T > 1 or needs.states[0])
        wants_weights = any(needs.weights)
        fields, buffers = sizes.backward_sizes(s, wants_weights, wants_dx)
        # A single step reads each weight once. The weights are read unpacked for one row, or for few rows if they are
        # large. H, and I if dx is wanted, must then be multiples of the lanes.
        is_full = H % self.lanes == 0 and (I % self.lanes == 0 or not wants_dx)
        is_few = R == 1 or (R <= FEW_IN_PLACE and H * s.multiply_adds_per_unit * dtype.itemsize > LARGE)
        is_special = s.stack_size or s.components or self.needs_cast or s.heads > 1 or counts.products
        in_place = T == 1 and is_few and is_full and not is_special
        reads = {"packed_hh": multiplies_hh and not in_place, "packed_ih": wants_dx and not in_place}
        reads["packed_products"] = counts.products > 0
        packs = any(reads.values())
        fields |= {"gate_rows": B if stacked_gates else R, "accumulates": accumulates}
        transposed = sizes.transposed_sizes(s, self.panels, self.lanes)
        caches_weights = caches is not None and s.stack_size is None and packs
        packed = {name: transposed[name] for name, is_read in reads.items() if caches_weights or is_read}
        of_products = counts.products * s.h_width * (H // s.heads)
        digested = counts.x_preacts * H * I, counts.h_preacts * H * (s.h_width // s.heads), of_products
        self.prepare(
            fields=fields, buffers=buffers, packed=packed, caches_weights=caches_weights, digested=digested,
            in_place=in_place,
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
        wanted = [wants_dx, *needs.weights, *needs.states, *needs.inputs]
        wanted[3:5] = [want and has_bias for want, has_bias in zip(wanted[3:5], s.biased)]
        self.first_state = 1 + len(needs.weights)  # index of dh_0 among the gradients
        of_weights = range(1, self.first_state) if accumulates else ()
        self.sums = [k for k in of_weights if wanted[k]]  # of the gradients that calls get
        self.wanted = [k for k, want in enumerate(wanted) if want and k not in of_weights]
        self.allocations = {}
        for k in self.wanted:
            name = self.names[k]
            is_matrix = name == "x" or name.startswith("weight")
            self.allocations[f"d_{name}"] = new_of(shapes[k], weight_dtype if is_matrix else dtype)
        self.none = [None] * len(wanted)
        self.inner, self.is_single_step = counts.inner_states, s.is_single_step
        self.first_input = self.first_state + self.inner + 1
        self.bindings: dict[Any, Binding] = {}

    def run(self, grads: Run, layer: Layer, run: Run) -> Gradients:
        """Return the wanted gradients of a layer: `begin`, the kernel, and `end`."""
        frame = self.begin(grads, layer, run)
        if frame.is_written:
            frame.run()
        return self.end(frame)

    def begin(
        self, grads: Run, layer: Layer, run: Run, form: list[Any] | None = None, sums: Sequence[Any] = ()
    ) -> Frame:
        """Return a frame for the backward pass of a readable layer. dh, dx and weight gradients are bfloat16 if x is.
        `form`, `sums`: see `fastlstm.backends.base.Plan`. The form gets this kernel and the binding, if they serve all
        such calls.
        """
        x, weights, initial, lengths, reset, _, _, inputs, *_ = layer
        if self.prepares_weights:
            weights = self.prepared(weights)
        h, saved, inner = run.h, run.saved, self.inner
        if self.is_single_step:
            h, saved = (saved[0], saved[1:]) if len(saved) > 1 else (None, (*[None] * inner, *saved))
        operands = self.prototype, x, *weights, *initial, *inputs, lengths, reset, *[sums[k - 1] for k in self.sums]
        results: Sequence[Any] = h, *saved, grads.h, *grads.last, *(grads.saved or [None] * inner)
        if form:
            _, binding, unreadable = form
            if unreadable:
                results = readable = [*results]
                for k in unreadable:
                    readable[k] = with_rows(readable[k])
        else:
            given, first = results, inner + 2  # index of dh
            results = with_rows(h), *map(contiguous, given[1:first]), *map(with_rows, given[first:])
            binding = self.binding_of((*operands, *results), results, initial[0] is None)
            unreadable = [k for k, (a, b) in enumerate(zip(results, given)) if a is not b]
            if form is not None and not any(0 < k < first for k in unreadable):
                form += self, binding, unreadable
        return self.start(binding, (*operands, *results), (grads, layer, run))

    def binding_of(self, operands: Sequence[Any], results: Sequence[Any], has_zeros: bool) -> Binding:
        """Return the binding of readable operands, of which `results` are the last. `has_zeros`: whether the initial
        states are missing.
        """
        key = has_zeros, *[None if a is None else a.stride() for a in results]
        binding = self.bindings.get(key)
        if binding is None:
            if len(self.bindings) >= MOST_BINDINGS:
                self.bindings.clear()
            binding = self.bindings[key] = self._bind(operands, results)
        return binding

    def _bind(self, operands: Sequence[Any], results: Sequence[Any]) -> Binding:
        counts = self.signature.counts
        inner = range(counts.inner_states)
        # the fields of the results and of their gradients, in the order of `results`
        fields = ["h", *[f"sequence{k}" for k in inner], "gates", "dh", "dh_n"]
        fields += [*[f"d_last{k}" for k in inner], *[f"d_sequence{k}" for k in inner]]
        sources = {field: (field, 0) for field in fields}
        for field, a in zip(fields, results):
            if a is not None:
                name = field.rstrip("0123456789")
                for axis, stride in ("step", a.stride(0) if a.dim() > 2 else 0), ("row", a.stride(-2)):
                    sources[f"{name}_{axis}_stride{field[len(name) :]}"] = ZERO, stride * a.element_size()
            elif field == "dh":
                sources[field] = ZERO, self.zeros_address
        gradients = {"dx": "x", "dweight_ih": "weight_ih", "dweight_hh": "weight_hh", "dbias_ih": "bias"}
        gradients |= {"dbias_hh": "bias_hh", "dh_0": "state0"}
        gradients |= {f"d_initial{k}": f"state{k + 1}" for k in inner}
        gradients |= {f"d_operand{k}": f"input{k}" for k in range(counts.inputs)}
        # of params, then of products as kernels have them
        vectors = *range(self.first_product - counts.params, self.first_product), *self.products
        gradients |= {f"dparam{k}": self.names[1 + index] for k, index in enumerate(vectors)}
        sources |= {field: (f"d_{name}", 0) for field, name in gradients.items()}
        return self.bind(operands, [*[f"d_{self.names[k]}" for k in self.sums], *fields], self.allocations, sources)

    def end(self, frame: Frame) -> Gradients:
        """Return the gradients of a frame that has run."""
        _, _, results, arguments, *_ = frame.call
        if self.finish(frame):
            without_unit: Gradients = self.without_bf16_unit.run(*arguments)
            return without_unit
        gradients: list[Any] = [*self.none]
        for k, a in zip(self.wanted, results):
            gradients[k] = a
        (_, layer, _), first_state, first_input = arguments, self.first_state, self.first_input
        if gradients[0] is None and self.needs.x:  # a cell may multiply no x
            gradients[0] = torch.zeros_like(layer.x if layer.x.dim() < 4 else layer.x.flatten(1, 2))
        weights, states = gradients[1:first_state], gradients[first_state:first_input]
        return new_gradients((gradients[0], tuple(weights), tuple(states), tuple(gradients[first_input:])))
