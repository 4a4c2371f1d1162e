"""Pointers that a loop over batch rows moves along: one for each array that the rows of a primitive read or write."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.loops import counted
from fastlstm.backends.numba.llvm.simd import I32, I64, Lanes, Vector, load, store


class RowPointers:
    """The arrays of a loop over rows, by name. Each has a pointer of its own, which a row moves on by the stride.

    Attributes:
        vector: bytes of a vector.
        at: in a row of the loop, each array's address in this row.
    """

    def __init__(self, b: ir.IRBuilder, lanes: Lanes) -> None:
        self.b, self.lanes, self.vector = b, lanes, lanes.size * lanes.count
        self.starts: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.at: dict[str, ir.Value] = {}

    def add(self, name: str, start: ir.Value, row_stride: ir.Value | int) -> None:
        """Add an array whose first row lies at `start`, and whose rows are `row_stride` bytes apart."""
        self.starts[name] = start, I64(row_stride) if isinstance(row_stride, int) else row_stride

    def add_table(self, names: list[str], wanted: Any, table: ir.Value, row: ir.Value, unit: ir.Value) -> None:
        """Add those `names` of a pointer table that are wanted, from batch row `row` on, at bytes `unit` of a row."""
        b = self.b
        for k, name in enumerate(names):
            if name in wanted:
                start, row_stride = (load(b, I64, b.add(table, I64(16 * k + 8 * n))) for n in range(2))
                self.add(name, b.add(b.add(start, b.mul(row, row_stride)), unit), row_stride)

    def load(self, name: str, k: int = 0) -> Vector:
        """Return the k-th vector of this row."""
        at = self.b.add(self.at[name], I64(k * self.vector))
        return Vector(self.b, self.lanes, self.lanes.load(self.b, at))

    def load_number(self, name: str, k: int) -> Vector:
        """Return the k-th number of this row, in every lane."""
        at = self.b.add(self.at[name], I64(k * self.lanes.size))
        return Vector(self.b, self.lanes, self.lanes.broadcast(self.b, at))

    def store_number(self, value: Vector, name: str, k: int) -> None:
        """Store a value that is the same in every lane as the k-th number of this row."""
        at = self.b.add(self.at[name], I64(k * self.lanes.size))
        store(self.b, self.b.extract_element(value.value, I32(0)), at, self.lanes.size)

    def store(self, value: Any, name: str, k: int = 0, inside: Any = None, past_caches: int = 0) -> None:
        """Store the k-th vector of this row: a value, or zeros where it is None, or in lanes that are not `inside`."""
        zeros = self.lanes.splat(0.0)
        raw = zeros if value is None else value.value if isinstance(value, Vector) else self.lanes.splat(value)
        if inside is not None:
            raw = self.b.select(inside, raw, zeros)
        self.lanes.store(self.b, raw, self.b.add(self.at[name], I64(k * self.vector)), past_caches)

    def loop(self, rows: ir.Value, body: Callable[[], None]) -> None:
        """Emit the loop, in which `body` emits what a row does."""
        names = list(self.starts)

        def row(*places: ir.Value) -> list[ir.Value]:
            self.at = dict(zip(names, places))
            body()
            return [self.b.add(place, self.starts[name][1]) for name, place in zip(names, places)]

        counted(self.b, rows, [start for start, _ in self.starts.values()], row)
