"""The backward kernel, for calls of one signature."""

from __future__ import annotations

from typing import Any

from fastlstm.backends.base import Gradients, Layer, Run, bias_gradients, wants_bias
from fastlstm.backends.cpu import address, rows_contiguous
from fastlstm.backends.memory import new_of
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.passes import Pass
from fastlstm.backends.numba.host.signature import Signature


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
        T, B, R, I, H, to_x = s.T, s.B, s.rows, s.I, s.H, needs.x
        reads, (threads, parts) = {"packed_hh": T > 1 or needs.states[0], "packed_ih": to_x}, self.split(back=True)
        sums, packs = any(needs.weights), any(reads.values())
        fields, buffers, of_x, of_sums = sizes.backward_sizes(s, sums, to_x)
        fields |= {"gate_rows": B if in_groups else R, "packs": packs}
        layout = s.pieces or of_x  # of the weights for the products for x, which are packed to be kept even if unread
        transposed = sizes.transposed_sizes(I, H, self.panels, self.lanes, s.pieces, layout)
        keeps = kept is not None and s.groups is None and packs
        packed = {name: transposed[name] for name, is_read in reads.items() if keeps or is_read}
        task = sizes.backward_task(s.pieces, of_x, of_sums)
        self.prepare(task, of_x or of_sums, layout, threads, parts, fields, buffers, packed, keeps, (I, H))
        stack, made = () if s.groups is None else (s.groups,), self.like.bfloat16() if s.narrow else self.like
        shapes: Any = (R, I) if s.step else (T, R, I), (*stack, 4 * H, I), (*stack, 4 * H, H), (*stack, 4 * H)
        likes = (*[made] * 3, *[self.like] * 3)
        wanted = to_x, *needs.weights[:2], wants_bias(needs), *needs.states
        self.wanted = [
            (like if want else None, new_of(like, shape), shape)
            for want, like, shape in zip(wanted, likes, (*shapes, self.states, self.states))
        ]

    def run(self, grads: Run, layer: Layer, run: Run) -> Gradients:
        """The gradients that are wanted of a layer of this signature. Where it is ``narrow``, dh, dx and the gradients
        of the weights are of bfloat16, too, and all others float32.
        """
        given: Any = layer
        x, (weight_ih, weight_hh, *biases), (h_0, c_0), lengths, reset, *_ = given
        dh, dh_n, dc_n, dc = (
            a if a is None else rows_contiguous(a) for a in (grads.h, *grads.last, *(grads.kept or (None,)))
        )
        c, gates = (None, *run.kept)[-2:]  # a step has no c, and reads neither that nor h
        of_h_0 = of_c_0 = self.zeros
        row_h = row_c = 0
        if h_0 is not None:
            (h_0, row_h), (c_0, row_c) = self.given(h_0), self.given(c_0)
            of_h_0, of_c_0 = h_0.data_ptr(), c_0.data_ptr()
        lengths, reset = (a if a is None else a.contiguous() for a in (lengths, reset))
        results = [like if like is None else new(like, *shape) for like, new, shape in self.wanted]
        dx, dweight_ih, dweight_hh, dbias, dh_0, dc_0 = results
        call = (
            x.data_ptr(), of_h_0, row_h, of_c_0, row_c, address(lengths), address(reset), address(run.h), address(c),
            address(gates), *((0, 0, 0) if dh is None else sizes.step_row(dh)),
            *((0, 0) if dh_n is None else sizes.row(dh_n)), *((0, 0) if dc_n is None else sizes.row(dc_n)),
            *((0, 0, 0) if dc is None else sizes.step_row(dc)), *(0 if a is None else a.data_ptr() for a in results),
        )  # fmt: skip
        by_group = None
        if self.groups > 1:
            of_rows: Any = {"h_0": h_0, "c_0": c_0, "h": run.h, "c": c, "dh": dh, "dh_n": dh_n, "dc_n": dc_n, "dc": dc}
            of_weights = {"dweight_ih": dweight_ih, "dweight_hh": dweight_hh, "dbias": dbias}
            (of_weights if self.in_groups else of_rows)["gates"] = gates
            of_rows |= {"dx": dx, "dh_0": dh_0, "dc_0": dc_0}
            by_group = self.signature.group_strides
            by_group = by_group | sizes.row_steps(self.signature.B, **of_rows) | sizes.first_steps(**of_weights)
        if self.enter((weight_ih, weight_hh, None, None), call, by_group):
            found: Gradients = self.without_unit.run(grads, layer, run)
            return found
        if biases[0] is biases[1] is None:
            dbias = None
        return Gradients(dx, (dweight_ih, dweight_hh, *bias_gradients(dbias, self.needs)), (dh_0, dc_0))
