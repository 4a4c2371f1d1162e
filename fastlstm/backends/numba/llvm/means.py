"""What a cell that takes means has beside its functions of units: phases, and values that a row's units share.

`cells.phases` splits a derived function. A phase begins with a function of rows, which turns the sums that the phase
before has left into means. Then its function of units runs over all panels, and adds up the sums of the next means.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm import functions
from fastlstm.backends.numba.llvm.functions import ON_VECTORS
from fastlstm.backends.numba.llvm.loops import Builder
from fastlstm.backends.numba.llvm.pointers import RowPointers
from fastlstm.backends.numba.llvm.simd import I64, Lanes, Vector
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


def of_rows(lanes: Lanes, phases: Phases, saved: tuple[str, ...], vectors: int, backward: bool) -> Builder:
    """Return what builds the begin of a phase: it computes what a row's units share.

    The function that is built takes, as integers:
        rows, phase, H: the number of batch rows, of the phase, and of units.
        shared, row_stride: see `AcrossPhases`. In phase 0 the sums are set to zero.
        saved_at: the address of (rows, `vectors` times lanes), numbers by the names in `saved`. The forward pass stores
            them, and the backward pass reads them.
    """
    vector, names, sums = lanes.size * lanes.count, phases.of_rows, phases.sums

    def build(b, rows, phase, H, shared, row_stride, saved_at):
        units = lanes.wide(b, b.sitofp(H, lanes.scalar))
        for k, each in enumerate(phases.phases):
            with in_phase(b, phase, k):
                at = RowPointers(b, lanes)
                at.add(_SHARED, shared, row_stride)
                at.add(_SAVED, saved_at, vectors * vector)
                at.loop(rows, partial(row, at, each.rows, units, k))

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
