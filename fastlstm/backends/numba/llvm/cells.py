"""The elementwise part of a step as LLVM functions, made from what is derived from a cell.

They have the arguments of the other primitives: 64-bit integers. A function takes one vector of units for some batch
rows. What there are as many of as the cell has states or inputs is found by a table of int64, in the order of
`forward_table` and `backward_table`: the address of row 0 and unit 0, and the bytes from one row to the next.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm import functions
from fastlstm.backends.numba.llvm.functions import ON_VECTORS
from fastlstm.backends.numba.llvm.loops import Builder, Builders, counted
from fastlstm.backends.numba.llvm.simd import I64, Lanes, Vector, load
from fastlstm.cells.emit import ByName, python
from fastlstm.cells.layout import Layout
from fastlstm.cells.spec import Cell

Values = Mapping[str, Any]
OUTSIDE = "dh from outside"  # what places are called that are no values of a cell has blanks


@dataclass(frozen=True)
class Functions:
    """What kernels need of a cell.

    Attributes:
        source: all that the primitives are made from.
        forward, backward: the derived functions on vectors, with arguments and results by name.
        takes: the names of their arguments.
    """

    layout: Layout
    source: str
    forward: ByName
    backward: ByName
    takes: tuple[tuple[str, ...], tuple[str, ...]]


@cache
def functions_of(cell: Cell) -> Functions:
    """A cell's functions on vectors."""
    derived = cell.derived()
    forward, backward = derived.forward, derived.backward
    source = "\n".join([python(forward), python(backward), repr(vars(cell.layout))])
    takes = tuple(forward.arguments), tuple(backward.arguments)
    compute = ON_VECTORS, functions.__name__
    return Functions(cell.layout, source, forward.by_name(*compute), backward.by_name(*compute), takes)


def forward_table(layout: Layout) -> list[str]:
    """Each state before the step and after it, then inputs and params."""
    states = [name for state in layout.states for name in (f"{state}_prev", state)]
    return [*states, *layout.inputs, *layout.params]


def backward_table(layout: Layout) -> list[str]:
    """`forward_table`, then the gradients that come from outside to the first state."""
    return [*forward_table(layout), OUTSIDE]


class _Rows:
    """Places in memory that a loop over rows goes along, each a pointer of its own."""

    def __init__(self, b: ir.IRBuilder, lanes: Lanes) -> None:
        self.b, self.lanes, self.vector = b, lanes, lanes.size * lanes.count
        self.starts: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.at: dict[str, ir.Value] = {}

    def add(self, name: str, start: ir.Value, step: ir.Value | int) -> None:
        self.starts[name] = start, I64(step) if isinstance(step, int) else step

    def add_table(self, names: list[str], wanted: Any, table: ir.Value, row: ir.Value, unit: ir.Value) -> None:
        """Those of a table that are wanted, from batch row `row` on, at bytes `unit` of a row."""
        b = self.b
        for k, name in enumerate(names):
            if name in wanted:
                start, step = (load(b, I64, b.add(table, I64(16 * k + 8 * n))) for n in range(2))
                self.add(name, b.add(b.add(start, b.mul(row, step)), unit), step)

    def load(self, name: str, vector: int = 0) -> Vector:
        at = self.b.add(self.at[name], I64(vector * self.vector))
        return Vector(self.b, self.lanes, self.lanes.load(self.b, at))

    def store(self, value: Any, name: str, vector: int = 0, inside: Any = None, past_caches: int = 0) -> None:
        """Store a value, zeros where it is None, or outside of the lanes that are `inside`."""
        zeros = self.lanes.splat(0.0)
        raw = zeros if value is None else value.value if isinstance(value, Vector) else self.lanes.splat(value)
        if inside is not None:
            raw = self.b.select(inside, raw, zeros)
        self.lanes.store(self.b, raw, self.b.add(self.at[name], I64(vector * self.vector)), past_caches)

    def loop(self, rows: ir.Value, body: Callable[[], None]) -> None:
        names = list(self.starts)

        def row(*places: ir.Value) -> list[ir.Value]:
            self.at = dict(zip(names, places))
            body()
            return [self.b.add(place, self.starts[name][1]) for name, place in zip(names, places)]

        counted(self.b, rows, [start for start, _ in self.starts.values()], row)


def forward(lanes: Lanes, cell: Functions, save: bool, streams: bool = False) -> Builder:
    """The new states and, if `save`, what backward loads (rows, K, lanes): past the caches if it `streams`."""
    layout, vector = cell.layout, lanes.size * lanes.count

    def build(b, rows, row, unit, preact, saved, table):
        at, taken = _Rows(b, lanes), cell.takes[0]
        at.add("all sums", preact, len(layout.sums) * vector)
        at.add_table(forward_table(layout), {*taken, *layout.states}, table, row, unit)
        if save:
            at.add("what is saved", saved, len(layout.saved) * vector)

        def body():
            given = {
                f"{gate}_pre": at.load("all sums", k) for k, gate in enumerate(layout.sums) if f"{gate}_pre" in taken
            }
            found = cell.forward(given | {name: at.load(name) for name in at.at if name in taken})
            for state in reversed(layout.states):
                at.store(found[state], state)
            for k, name in enumerate(layout.saved if save else ()):
                at.store(found[name], "what is saved", k, past_caches=vector if streams else 0)

        at.loop(rows, body)

    return build


def backward(lanes: Lanes, cell: Functions) -> Builder:
    """dpreact (rows, S + P, lanes), of which the last are the terms of the params' gradients; the terms dinputs
    (rows, Q, lanes); and the gradients carried to the step before, a state's (rows, lanes) in place, `carried_state`
    bytes from one to the next: those of the states but the first, then the first's if there is one.

    The gradient of the first state is dh (rows, 4, lanes) and what comes from outside. Lanes from `valid` on of dpreact
    get zeros, since a product sums over them.
    """
    layout, vector = cell.layout, lanes.size * lanes.count
    first, *others = layout.states
    terms = [*(f"{gate}_pre" for gate in layout.sums), *layout.params]
    carried = [*others, *(state for state in layout.carried if state == first)]

    def build(b, rows, row, unit, valid, dh, saved, dpreact, dinputs, first_carried, carried_state, table):
        inside, (_, taken), at = lanes.first(b, valid), cell.takes, _Rows(b, lanes)
        at.add("dh of the step after", dh, 4 * vector)
        at.add_table(backward_table(layout), {*taken, OUTSIDE}, table, row, unit)
        at.add("what is saved", saved, len(layout.saved) * vector)
        at.add("all terms", dpreact, len(terms) * vector)
        at.add("all dinputs", dinputs, len(layout.inputs) * vector)
        for k, state in enumerate(carried):
            at.add(f"carried {state}", b.add(first_carried, b.mul(carried_state, I64(k))), vector)

        def body():
            given = {name: at.load("what is saved", k) for k, name in enumerate(layout.saved)}
            given |= {name: at.load(name) for name in at.at if name in taken}
            given |= {f"d{state}": at.load(f"carried {state}") for state in others if f"d{state}" in taken}
            if f"d{first}" in taken:
                given[f"d{first}"] = at.load("dh of the step after") + at.load(OUTSIDE)
            found = cell.backward(given)
            for state in carried:
                at.store(found.get(f"d{state}_prev"), f"carried {state}")
            for k, name in enumerate(terms):
                at.store(found.get(f"d{name}"), "all terms", k, inside)
            for k, name in enumerate(layout.inputs):
                at.store(found.get(f"d{name}"), "all dinputs", k)

        at.loop(rows, body)

    return build


def builders(lanes: Lanes, cell: Functions) -> Builders:
    return {
        "cell_forward": (6, forward(lanes, cell, False)),
        "cell_forward_saving": (6, forward(lanes, cell, True)),
        "cell_forward_streaming": (6, forward(lanes, cell, True, streams=True)),
        "cell_backward": (11, backward(lanes, cell)),
    }


NAMES = "cell_forward", "cell_forward_saving", "cell_forward_streaming", "cell_backward"
