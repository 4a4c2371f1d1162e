"""What a cell that takes means has beside its functions of units: phases, and values that a row's units share.

`cells.phases` splits a derived function. A phase begins with a function of rows, which turns the sums that the phase
before has left into means. Then its function of units runs over all panels, and adds up the sums of the next means. A
mean of a head is of values that are kept for each unit, and the next phase begins by putting the mean in their place.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm import functions
from fastlstm.backends.numba.llvm.functions import ON_VECTORS
from fastlstm.backends.numba.llvm.loops import Builder, counted
from fastlstm.backends.numba.llvm.pointers import RowPointers
from fastlstm.backends.numba.llvm.simd import I64, Lanes, Vector, load, store
from fastlstm.cells.emit import ByName, Function
from fastlstm.cells.phases import Phases

_LATER, _SHARED, _SAVED = "values of units for later phases", "values of rows, then sums", "saved values of rows"


def on_vectors(function: Function) -> ByName:
    """Return a derived function that takes and returns vectors by name."""
    return function.by_name(ON_VECTORS, functions.__name__)


@contextmanager
def in_phase(b: ir.IRBuilder, phase: ir.Value | None, k: int) -> Iterator[None]:
    """What is emitted inside runs in phase k alone. Without a `phase` there is one, and it always runs."""
    if phase is None:
        yield
    else:
        with b.if_then(b.icmp_signed("==", phase, I64(k))):
            yield


class AcrossPhases:
    """What passes from phase to phase, as the function of units sees it.

    Args:
        at: pointers of the loop over rows, to which these arrays are added.
        later: the address of (rows, K, lanes), values of units that a later phase reads.
        shared: the address of (rows, V + M, lanes), the values that a row's units share and the sums of the means. A
            sum has a part in each lane.
        row_stride: bytes from one row of `shared` to the next.
    """

    def __init__(self, at: RowPointers, phases: Phases, later: Any, shared: Any, row_stride: Any) -> None:
        self.at, self.phases = at, phases
        if phases.kept:
            at.add(_LATER, later, len(phases.kept) * at.vector)
        if phases.of_rows:
            at.add(_SHARED, shared, row_stride)

    def load(self, names: Any) -> dict[str, Vector]:
        """Return those values by name that are among `names`."""
        later = {name: self.at.load(_LATER, k) for k, name in enumerate(self.phases.kept) if name in names}
        shared = {name: self.at.load(_SHARED, k) for k, name in enumerate(self.phases.of_rows) if name in names}
        return later | shared

    def store(self, results: Mapping[str, Any], inside: Any) -> None:
        """Store what later phases read of the results, and add lanes that are `inside` to the sums."""
        for k, name in enumerate(self.phases.kept):
            if name in results:
                self.at.store(results[name], _LATER, k)
        for k, name in enumerate(self.phases.sums, len(self.phases.of_rows)):
            if name in results:
                b, lanes = self.at.b, self.at.lanes
                term = Vector(b, lanes, b.select(inside, results[name].value, lanes.splat(0.0)))
                self.at.store(self.at.load(_SHARED, k) + term, _SHARED, k)


def put_means_of_heads(
    b: ir.IRBuilder, lanes: Lanes, rows: Any, row_bytes: int, panel_bytes: Any, values: Any, H: Any, D: Any
) -> None:
    """Put the mean of each head of D units in the place of its values, for each row.

    Args:
        values: the address of those of the first row and the first panel.
        row_bytes, panel_bytes: from one row to the next, and from one panel to the next.
    """
    L, size, units = lanes.count, lanes.size, b.sitofp(D, lanes.scalar)

    def of_head(wide: bool, row: Any, unit: Any) -> None:
        """Vector by vector if heads begin where vectors do, otherwise unit by unit."""
        step, kind = (L, lanes.type) if wide else (1, lanes.scalar)

        def address(u: Any) -> Any:
            panel, lane = b.sdiv(u, I64(L)), b.srem(u, I64(L))
            return b.add(b.add(row, b.mul(panel, panel_bytes)), b.mul(lane, I64(size)))

        def add(u: Any, total: Any) -> list[Any]:
            return [b.add(u, I64(step)), b.fadd(total, load(b, kind, address(u), size))]

        def put(u: Any) -> list[Any]:
            store(b, mean, address(u), size)
            return [b.add(u, I64(step))]

        count = b.sdiv(D, I64(step))
        _, total = counted(b, count, [unit, lanes.splat(0.0) if wide else lanes.scalar(0.0)], add)
        mean = b.fdiv(lanes.total(b, total), lanes.wide(b, units)) if wide else b.fdiv(total, units)
        counted(b, count, [unit], put)

    def of_row(wide: bool, row: Any) -> list[Any]:
        def head(unit: Any) -> list[Any]:
            of_head(wide, row, unit)
            return [b.add(unit, D)]

        counted(b, b.sdiv(H, D), [I64(0)], head)
        return [b.add(row, I64(row_bytes))]

    with b.if_else(b.icmp_signed("==", b.srem(D, I64(L)), I64(0))) as branches:
        for branch, wide in zip(branches, (True, False)):
            with branch:
                counted(b, rows, [values], partial(of_row, wide))


def of_rows(lanes: Lanes, phases: Phases, saved: tuple[str, ...], vectors: int, backward: bool) -> Builder:
    """Return what builds the begin of a phase: it computes what a row's units share.

    The function that is built takes, as integers:
        rows, phase, H: the number of batch rows, of the phase, and of units.
        shared, row_stride: see `AcrossPhases`. In phase 0 the sums are set to zero.
        saved_at: the address of (rows, `vectors` times lanes), numbers by the names in `saved`. The forward pass stores
            them, and the backward pass reads them.
        later, panel_bytes: the address of what the first panel keeps for later phases, see `AcrossPhases`, and the
            bytes from there to the next panel's; 0 where panels follow each other as rows do.
        D: the units of a head.
    """
    vector, names, sums = lanes.size * lanes.count, phases.of_rows, phases.sums

    def build(b, rows, phase, H, shared, row_stride, saved_at, later, panel_bytes, D):
        units = lanes.wide(b, b.sitofp(H, lanes.scalar))
        for k, each in enumerate(phases.phases):
            with in_phase(b, phase, k):
                at = RowPointers(b, lanes)
                at.add(_SHARED, shared, row_stride)
                at.add(_SAVED, saved_at, vectors * vector)
                at.loop(rows, partial(row, at, each.rows, units, k))
                row_bytes = len(phases.kept) * vector
                to_panel = b.select(b.icmp_signed("==", panel_bytes, I64(0)), I64(row_bytes), panel_bytes)
                for n in each.of_heads:
                    put_means_of_heads(b, lanes, rows, row_bytes, to_panel, b.add(later, I64(n * vector)), H, D)

    def row(at, function, units, k):
        b, taken = at.b, set(function.arguments)
        for n in range(len(names), len(names) + len(sums) if k == 0 else 0):
            at.store(None, _SHARED, n)
        values = {name: at.load(_SHARED, n) for n, name in enumerate(names) if name in taken}
        for n, name in enumerate(sums, len(names)):
            if name in taken:
                values[name] = Vector(b, lanes, b.fdiv(lanes.total(b, at.load(_SHARED, n).value), units))
        for n, name in enumerate(saved if backward else ()):
            if name in taken:
                values[name] = at.load_number(_SAVED, n)
        results = on_vectors(function)(values)
        for n, name in enumerate(names):
            if name in results:
                at.store(results[name], _SHARED, n)
        for n, name in enumerate(saved):
            if name in results:
                at.store_number(results[name], _SAVED, n)

    return build
