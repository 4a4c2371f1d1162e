"""Phases of a cell that takes means, see `cells.phases`, and the values that a row's units share.

A phase begins with a function of rows, which turns the sums of the phase before into means. Then its function of units
runs over all panels, and adds to the next sums. For a mean of a head the phase stores a value of each unit, and the
next phase begins by replacing these by their mean.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm import vector_functions
from fastlstm.backends.numba.llvm.loops import Builder, for_loop
from fastlstm.backends.numba.llvm.pointers import RowPointers
from fastlstm.backends.numba.llvm.simd import I64, Vector, VectorType, load, store
from fastlstm.backends.numba.llvm.vector_functions import ON_VECTORS
from fastlstm.cells.emit import ByName, Function
from fastlstm.cells.phases import Phases

_LATER, _SHARED, _SAVED = "values of units for later phases", "values of rows, then sums", "saved values of rows"


def on_vectors(function: Function) -> ByName:
    """Return a derived function that takes and returns vectors by name."""
    return function.by_name(ON_VECTORS, vector_functions.__name__)


@contextmanager
def in_phase(b: ir.IRBuilder, phase: ir.Value | None, k: int) -> Iterator[None]:
    """Let the instructions emitted inside run in phase k alone, or always if `phase` is None."""
    if phase is None:
        yield
    else:
        with b.if_then(b.icmp_signed("==", phase, I64(k))):
            yield


class AcrossPhases:
    """Gives the function of units access to values that pass from phase to phase.

    Args:
        arrays: the arrays of the loop over rows, to which these are added.
        later: the address of (rows, K, lanes), values of units that a later phase reads.
        shared: (rows, V + M, lanes), the values that a row's units share and the sums of the means, a part in each
            lane, `row_stride` apart.
    """

    def __init__(self, arrays: RowPointers, phases: Phases, later: Any, shared: Any, row_stride: Any) -> None:
        self.arrays, self.phases = arrays, phases
        if phases.kept:
            arrays.add(_LATER, later, len(phases.kept) * arrays.vector)
        if phases.of_rows:
            arrays.add(_SHARED, shared, row_stride)

    def load(self, names: Any) -> dict[str, Vector]:
        """Return those of the `names` that are such values."""
        later = {name: self.arrays.load(_LATER, k) for k, name in enumerate(self.phases.kept) if name in names}
        shared = {name: self.arrays.load(_SHARED, k) for k, name in enumerate(self.phases.of_rows) if name in names}
        return later | shared

    def store(self, results: Mapping[str, Any], inside: Any) -> None:
        """Store those results that later phases read, and add the lanes that are `inside` to the sums."""
        for k, name in enumerate(self.phases.kept):
            if name in results:
                self.arrays.store(results[name], _LATER, k)
        for k, name in enumerate(self.phases.sums, len(self.phases.of_rows)):
            if name in results:
                b, vtype = self.arrays.b, self.arrays.vtype
                term = Vector(b, vtype, b.select(inside, results[name].value, vtype.splat(0.0)))
                self.arrays.store(self.arrays.load(_SHARED, k) + term, _SHARED, k)


def put_means_of_heads(
    b: ir.IRBuilder, vtype: VectorType, rows: Any, row_bytes: int, panel_bytes: Any, values: Any, H: Any, D: Any
) -> None:
    """Replace the values of each head of D units by their mean, for each row. `row_bytes` and `panel_bytes`: the
    strides from row to row and from panel to panel. `values`: those of the first row and the first panel.
    """
    L, size, units = vtype.count, vtype.size, b.sitofp(D, vtype.scalar)

    def of_head(wide: bool, row: Any, unit: Any) -> None:
        """Replace the values of a head: vector by vector if heads begin where vectors do, otherwise unit by unit."""
        step, kind = (L, vtype.type) if wide else (1, vtype.scalar)

        def address(u: Any) -> Any:
            panel, lane = b.sdiv(u, I64(L)), b.srem(u, I64(L))
            return b.add(b.add(row, b.mul(panel, panel_bytes)), b.mul(lane, I64(size)))

        def add(u: Any, total: Any) -> list[Any]:
            return [b.add(u, I64(step)), b.fadd(total, load(b, kind, address(u), size))]

        def put(u: Any) -> list[Any]:
            store(b, mean, address(u), size)
            return [b.add(u, I64(step))]

        count = b.sdiv(D, I64(step))
        _, total = for_loop(b, count, [unit, vtype.splat(0.0) if wide else vtype.scalar(0.0)], add)
        mean = b.fdiv(vtype.total(b, total), vtype.broadcast_value(b, units)) if wide else b.fdiv(total, units)
        for_loop(b, count, [unit], put)

    def of_row(wide: bool, row: Any) -> list[Any]:
        def head(unit: Any) -> list[Any]:
            of_head(wide, row, unit)
            return [b.add(unit, D)]

        for_loop(b, b.sdiv(H, D), [I64(0)], head)
        return [b.add(row, I64(row_bytes))]

    with b.if_else(b.icmp_signed("==", b.srem(D, I64(L)), I64(0))) as branches:
        for branch, wide in zip(branches, (True, False)):
            with branch:
                for_loop(b, rows, [values], partial(of_row, wide))


def of_rows(vtype: VectorType, phases: Phases, saved: tuple[str, ...], vectors: int, backward: bool) -> Builder:
    """Return the builder of the begin of a phase, which computes the values that a row's units share, from:

    rows, phase, H: the number of batch rows, of the phase, and of units.
    shared, row_stride: see `AcrossPhases`. In phase 0 the sums are set to zero.
    saved_at: the numbers named in `saved`, (rows, `vectors` times lanes): the forward pass stores what backward
        reads.
    later, panel_bytes: the first panel's values for later phases, and the stride to the next panel's, or 0.
    D: the units of a head.
    """
    vector, names, sums = vtype.size * vtype.count, phases.of_rows, phases.sums

    def build(b, rows, phase, H, shared, row_stride, saved_at, later, panel_bytes, D):
        units = vtype.broadcast_value(b, b.sitofp(H, vtype.scalar))
        for k, each in enumerate(phases.phases):
            with in_phase(b, phase, k):
                arrays = RowPointers(b, vtype)
                arrays.add(_SHARED, shared, row_stride)
                arrays.add(_SAVED, saved_at, vectors * vector)
                arrays.loop(rows, partial(row, arrays, each.rows, units, k))
                row_bytes = len(phases.kept) * vector
                to_panel = b.select(b.icmp_signed("==", panel_bytes, I64(0)), I64(row_bytes), panel_bytes)
                for n in each.of_heads:
                    put_means_of_heads(b, vtype, rows, row_bytes, to_panel, b.add(later, I64(n * vector)), H, D)

    def row(arrays, function, units, k):
        b, taken = arrays.b, set(function.arguments)
        for n in range(len(names), len(names) + len(sums) if k == 0 else 0):
            arrays.store(None, _SHARED, n)
        values = {name: arrays.load(_SHARED, n) for n, name in enumerate(names) if name in taken}
        for n, name in enumerate(sums, len(names)):
            if name in taken:
                values[name] = Vector(b, vtype, b.fdiv(vtype.total(b, arrays.load(_SHARED, n).value), units))
        for n, name in enumerate(saved if backward else ()):
            if name in taken:
                values[name] = arrays.load_number(_SAVED, n)
        results = on_vectors(function)(values)
        for n, name in enumerate(names):
            if name in results:
                arrays.store(results[name], _SHARED, n)
        for n, name in enumerate(saved):
            if name in results:
                arrays.store_number(results[name], _SAVED, n)

    return build
