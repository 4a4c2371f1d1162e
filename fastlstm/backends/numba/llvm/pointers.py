"""Pointers for loops over batch rows: one for each array that the rows of a primitive read or write."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm.loops import for_loop
from fastlstm.backends.numba.llvm.simd import I8, I32, I64, Vector, VectorType, instruction, load, store


class RowPointers:
    """Points to the arrays of a loop over rows, by name, each by a pointer that moves on by its stride. `vector`: the
    bytes of a vector. `current`: in a row of the loop, the address of each array's part of this row.
    """

    def __init__(self, b: ir.IRBuilder, vtype: VectorType) -> None:
        self.b, self.vtype, self.vector = b, vtype, vtype.size * vtype.count
        self.starts: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.current: dict[str, ir.Value] = {}

    def add(self, name: str, start: ir.Value, row_stride: ir.Value | int) -> None:
        """Add an array whose first row lies at `start`, and whose rows are `row_stride` bytes apart."""
        self.starts[name] = start, I64(row_stride) if isinstance(row_stride, int) else row_stride

    def add_table(
        self, names: list[str], wanted: Any, table: ir.Value, row: ir.Value, unit: ir.Value, alike: Any = ()
    ) -> None:
        """Add those `names` of a pointer table that are `wanted`, from `row` and byte `unit` on; those `alike` stay."""
        b = self.b
        for k, name in enumerate(names):
            if name in wanted:
                start, row_stride = (load(b, I64, b.add(table, I64(16 * k + 8 * n))) for n in range(2))
                start = b.add(b.add(start, b.mul(row, row_stride)), unit)
                self.add(name, start, 0 if name in alike else row_stride)

    def load(self, name: str, k: int = 0) -> Vector:
        """Load the k-th vector of this row."""
        address = self.b.add(self.current[name], I64(k * self.vector))
        return Vector(self.b, self.vtype, self.vtype.load(self.b, address))

    def prefetch(self, name: str, k: int, distance: ir.Value) -> None:
        """Fetch what lies `distance` bytes after the k-th vector of this row into the second-level cache."""
        address = self.b.add(self.b.add(self.current[name], I64(k * self.vector)), distance)
        pointer = self.b.inttoptr(address, I8.as_pointer())
        kind = f"llvm.prefetch.{pointer.type.intrinsic_name}"
        instruction(self.b, kind, ir.VoidType(), pointer, I32(0), I32(2), I32(1))  # reads data, for the second level

    def load_number(self, name: str, k: int) -> Vector:
        """Load the k-th number of this row into every lane."""
        address = self.b.add(self.current[name], I64(k * self.vtype.size))
        return Vector(self.b, self.vtype, self.vtype.broadcast(self.b, address))

    def store_number(self, value: Vector, name: str, k: int) -> None:
        """Store a value that is the same in every lane as the k-th number of this row."""
        address = self.b.add(self.current[name], I64(k * self.vtype.size))
        store(self.b, self.b.extract_element(value.value, I32(0)), address, self.vtype.size)

    def store(self, value: Any, name: str, k: int = 0, inside: Any = None, past_caches: int = 0) -> None:
        """Store the k-th vector of this row: `value`, or zeros if it is None and in lanes that are not `inside`."""
        zeros = self.vtype.splat(0.0)
        raw = zeros if value is None else value.value if isinstance(value, Vector) else self.vtype.splat(value)
        if inside is not None:
            raw = self.b.select(inside, raw, zeros)
        self.vtype.store(self.b, raw, self.b.add(self.current[name], I64(k * self.vector)), past_caches)

    def loop(self, rows: ir.Value, body: Callable[[], None]) -> None:
        """Emit the loop. `body` emits the instructions of a row."""
        names = list(self.starts)

        def row(*addresses: ir.Value) -> list[ir.Value]:
            self.current = dict(zip(names, addresses))
            body()
            return [self.b.add(address, self.starts[name][1]) for name, address in zip(names, addresses)]

        for_loop(self.b, rows, [start for start, _ in self.starts.values()], row)
