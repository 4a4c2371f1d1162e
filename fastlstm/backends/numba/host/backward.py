"""The backward kernel, for calls of one signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS, Gradients, Layer, Run
from fastlstm.backends.cpu import LARGE, address, rows_contiguous
from fastlstm.backends.memory import new_of
from fastlstm.backends.numba.constants import FEW_IN_PLACE
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.passes import Pass
from fastlstm.backends.numba.host.signature import Signature, contiguous


class Backward(Pass):
    """The backward kernel, for one set of wanted gradients. What stays packed are the transposed weights, if a product
    needs any.
    """

    kind = "Backward"

    def __init__(
        self, signature: Signature, needs: Gradients, in_groups: bool, kept: dict[Any, Any] | None = None
    ) -> None:
        """`in_groups`: whether the gates were saved by a stack, and not by one layer for all rows."""
        super().__init__(signature, kept)
        self.needs, self.in_groups, self.options, s = needs, in_groups, (needs, in_groups), signature
        T, B, R, I, H, counts, dtype = s.T, s.B, s.rows, s.I, s.H, s.counts, s.dtype
        to_x, back = needs.x and counts.of_x > 0, counts.of_h > 0 and (T > 1 or needs.states[0])
        threads, team_count = self.split(back=True)
        sums = any(needs.weights)
        fields, buffers, of_x, of_sums = sizes.backward_sizes(s, sums, to_x)
        # One step reads each weight once. A lone row, and few rows of large weights, take them as they lie, if panels
        # are full of units and vectors full of columns.
        full = H % self.lanes == 0 and (I % self.lanes == 0 or not to_x)
        few = R == 1 or (R <= FEW_IN_PLACE and H * s.products * dtype.itemsize > LARGE)
        other = s.groups or s.pieces or of_x or of_sums or self.casts or s.heads > 1
        in_place = T == 1 and few and full and not other
        reads = {"packed_hh": back and not in_place, "packed_ih": to_x and not in_place}
        packs = any(reads.values())
        fields |= {"gate_rows": B if in_groups else R, "packs": packs}
        layout = s.pieces or of_x  # of the weights for the products for x, which are packed to be kept even if unread
        transposed = sizes.transposed_sizes(s, self.panels, self.lanes, layout)
        keeps = kept is not None and s.groups is None and packs
        packed = {name: transposed[name] for name, is_read in reads.items() if keeps or is_read}
        digested = counts.of_x * H * I, counts.of_h * H * (H // s.heads)
        self.prepare(of_x or of_sums, layout, threads, team_count, fields, buffers, packed, keeps, digested, in_place)
        stack, made = () if s.groups is None else (s.groups,), self.like.bfloat16() if s.narrow else self.like
        of_x_rows, of_h_rows, states = counts.of_x * H, counts.of_h * H, [self.states] * (counts.others + 1)
        shapes: Any = (
            (R, I) if s.step else (T, R, I), (*stack, of_x_rows, I), (*stack, of_h_rows, H // s.heads),
            (*stack, of_x_rows), (*stack, of_h_rows), *[(*stack, H)] * counts.params, *states,
            *[(T, R, H)] * counts.inputs,
        )  # fmt: skip
        self.others, self.of_states = range(1, counts.others + 1), WEIGHTS + 1 + counts.params  # of `wanted`
        wanted = to_x, *needs.weights, *needs.states, *needs.inputs
        self.wanted = [
            (None if not want else made if k < 3 else self.like, new_of(self.like, shape), shape)
            for k, (want, shape) in enumerate(zip(wanted, shapes))
        ]

    def run(self, grads: Run, layer: Layer, run: Run) -> Gradients:
        """The gradients that are wanted of a layer of this signature. Where it is ``narrow``, dh, dx and the gradients
        of the weights are of bfloat16, too, and all others float32.
        """
        x, weights, starts, lengths, reset, *_ = layer
        starts = (*map(contiguous, starts),)
        first, zeros, dh, (h, *steps, gates) = starts[0], self.zeros, grads.h, map(contiguous, (run.h, *run.kept))
        if self.signature.step and steps:
            h, *steps = steps
        results = [like if like is None else new(like, *shape) for like, new, shape in self.wanted]
        addressed = [0 if a is None else a.data_ptr() for a in results]
        of_states, d_last, d_steps = self.of_states, [grads.last[0]], []
        of_first, row, of_dh, of_dh_n = zeros, 0, (zeros, 0, 0), (0, 0)
        if first is not None:
            of_first, row = first.data_ptr(), self.row
        if dh is not None:
            dh = rows_contiguous(dh)
            of_dh = sizes.step_row(dh)
        if d_last[0] is not None:
            d_last[0] = rows_contiguous(d_last[0])
            of_dh_n = sizes.row(d_last[0])
        lengths, reset = contiguous(lengths), contiguous(reset)
        call = [
            x.data_ptr(), of_first, row, address(lengths), address(reset), address(h), address(gates), *of_dh,
            *of_dh_n, *addressed[: WEIGHTS + 1], addressed[of_states],
        ]  # fmt: skip
        for k in self.others:
            d, end = grads.kept[k - 1] if grads.kept else None, grads.last[k]
            call += zeros if first is None else starts[k].data_ptr(), row
            call.append(steps[k - 1].data_ptr() if steps else 0)  # of a step nobody may read them
            if d is None:
                call += 0, 0, 0
            else:
                d = rows_contiguous(d)
                call += sizes.step_row(d)
            if end is None:
                call += 0, 0
            else:
                end = rows_contiguous(end)
                call += sizes.row(end)
            call.append(addressed[of_states + k])
            d_steps.append(d)
            d_last.append(end)
        values: list[Tensor] = []
        if self.has_values:
            told, values = self.values(layer, 0)
            inputs = len(layer.inputs)
            told[3 : 4 * inputs : 4] = addressed[len(addressed) - inputs :]
            call += *told, *addressed[WEIGHTS + 1 : of_states]
        by_group = None
        if self.groups > 1:
            by_group = self._by_group(values, starts, (h, *steps), gates, (dh, *d_steps), d_last, results)
        if self.enter((*weights[:2], None, None), call, by_group):
            found: Gradients = self.without_unit.run(grads, layer, run)
            return found
        dx, *of_weights = results[:of_states]
        for k in (2, 3):
            if weights[k] is None:
                of_weights[k] = None
        if dx is None and self.needs.x:  # a cell may multiply no x
            dx = torch.zeros_like(x if x.dim() < 4 else x.flatten(1, 2))
        end = of_states + len(starts)
        return Gradients(dx, (*of_weights,), (*results[of_states:end],), (*results[end:],))

    def _by_group(
        self, values: list[Tensor], starts: Any, steps: Any, gates: Any, d_steps: Any, d_last: Any, results: Any
    ) -> dict[str, int]:
        """Bytes from what is one group's to what is the next one's."""
        s, counts, of_states = self.signature, self.signature.counts, self.of_states
        names = "dx", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", *(f"dparam{k}" for k in range(counts.params))
        weights = dict(zip(names[1:], results[1:of_states]))
        rows = {"dx": results[0], "h": steps[0], "dh": d_steps[0], "dh_n": d_last[0], "dh_0": results[of_states]}
        rows["h_0"] = starts[0]
        for k in range(counts.others):
            rows[f"start{k}"] = starts[k + 1]
            rows |= {f"steps{k}": steps[k + 1], f"d{k}": d_steps[k + 1], f"d_last{k}": d_last[k + 1]}
            rows[f"d_start{k}"] = results[of_states + k + 1]
        rows |= {f"d_value{k}": a for k, a in enumerate(results[of_states + counts.others + 1 :])}
        (weights if self.in_groups else rows)["gates"] = gates
        found = s.group_strides | sizes.row_steps(s.B, **rows) | sizes.first_steps(**weights)
        return found | self.values_by_group(values)
