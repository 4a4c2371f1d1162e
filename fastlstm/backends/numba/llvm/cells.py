"""The elementwise part of a step as LLVM functions, made from what is derived from a cell.

They have the arguments of the other primitives: 64-bit integers. A function takes one vector of units for some batch
rows. What there are as many of as the cell has states or inputs is found by a table of int64, in the order of
`forward_table` and `backward_table`: the address of row 0 and unit 0, and the bytes from one row to the next.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from llvmlite import ir

from fastlstm.backends.numba.llvm import functions
from fastlstm.backends.numba.llvm.functions import ON_VECTORS
from fastlstm.backends.numba.llvm.loops import Builder, Builders, counted
from fastlstm.backends.numba.llvm.simd import I32, I64, Lanes, Vector, load, store
from fastlstm.cells.emit import ByName, Function, python
from fastlstm.cells.layout import Layout
from fastlstm.cells.phases import Phases, in_phases
from fastlstm.cells.spec import Cell

Values = Mapping[str, Any]
OUTSIDE = "dh from outside"  # what places are called that are no values of a cell has blanks


@dataclass(frozen=True)
class Functions:
    """What kernels need of a cell.

    Attributes:
        source: all that the primitives are made from.
        forward, saving, backward: the derived functions in phases: one each, unless the cell takes means.
        takes: the names of arguments of the forward pass and of the backward pass.
    """

    layout: Layout
    source: str
    forward: Phases
    saving: Phases
    backward: Phases
    takes: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def phases(self) -> tuple[int, int]:
        """How many phases a step of the forward pass has, and one of the backward pass."""
        return max(len(self.forward.phases), len(self.saving.phases)), len(self.backward.phases)


@cache
def functions_of(cell: Cell) -> Functions:
    """A cell's functions on vectors."""
    derived, layout = cell.derived(), cell.layout
    forward, backward = derived.forward, derived.backward
    terms = [f"d{name}" for name in (*(f"{gate}_pre" for gate in layout.sums), *layout.params)]
    passes = (
        in_phases(forward, cell.states),
        in_phases(forward, [*cell.states, *layout.saved], early=layout.saved_units, once=layout.saved_rows),
        in_phases(backward, backward.results, layout.saved_rows, early=terms),
    )
    source = "\n".join([python(forward), python(backward), repr(vars(cell.layout))])
    takes = tuple(forward.arguments), tuple(backward.arguments)
    return Functions(layout, source, *passes, takes)


def on_vectors(function: Function) -> ByName:
    return function.by_name(ON_VECTORS, functions.__name__)


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

    def load_number(self, name: str, k: int) -> Vector:
        """The k-th number of a row, in every lane."""
        at = self.b.add(self.at[name], I64(k * self.lanes.size))
        return Vector(self.b, self.lanes, self.lanes.broadcast(self.b, at))

    def store_number(self, value: Vector, name: str, k: int) -> None:
        """Store what is the same in every lane as the k-th number of a row."""
        at = self.b.add(self.at[name], I64(k * self.lanes.size))
        store(self.b, self.b.extract_element(value.value, I32(0)), at, self.lanes.size)

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


@contextmanager
def _in_phase(b: ir.IRBuilder, phase: ir.Value | None, k: int) -> Iterator[None]:
    """What is built is for phase k alone, if there are several."""
    if phase is None:
        yield
    else:
        with b.if_then(b.icmp_signed("==", phase, I64(k))):
            yield


class _Means:
    """What a phase of a cell has beside a function of units: values kept, sums, and what a row's units share."""

    def __init__(self, at: _Rows, phases: Phases, kept: ir.Value, of_rows: ir.Value, row_bytes: ir.Value) -> None:
        self.at, self.phases = at, phases
        if phases.kept:
            at.add("all kept", kept, len(phases.kept) * at.vector)
        if phases.of_rows:
            at.add("all of rows", of_rows, row_bytes)

    def load(self, taken: Any) -> dict[str, Vector]:
        """Those of its values that are taken."""
        found = {name: self.at.load("all kept", k) for k, name in enumerate(self.phases.kept) if name in taken}
        of_rows = enumerate(self.phases.of_rows)
        return found | {name: self.at.load("all of rows", k) for k, name in of_rows if name in taken}

    def store(self, found: Values, inside: Any) -> None:
        """What the phase has found for later ones."""
        for k, name in enumerate(self.phases.kept):
            if name in found:
                self.at.store(found[name], "all kept", k)
        for k, name in enumerate(self.phases.sums, len(self.phases.of_rows)):
            if name in found:
                zero, value = self.at.lanes.splat(0.0), found[name].value
                more = Vector(self.at.b, self.at.lanes, self.at.b.select(inside, value, zero))
                self.at.store(self.at.load("all of rows", k) + more, "all of rows", k)


def of_rows(lanes: Lanes, phases: Phases, saved_rows: tuple[str, ...], backward: bool) -> Builder:
    """What is the same for all units of a row, at the begin of a phase: the values, then the sums (rows, V + M, lanes),
    `row_bytes` from one to the next. Those that are saved, (rows, K, lanes), are read at the backward pass.
    """
    vector, names, sums = lanes.size * lanes.count, phases.of_rows, phases.sums

    def build(b, rows, phase, H, values, row_bytes, saved):
        whole = lanes.wide(b, b.sitofp(H, lanes.scalar))
        for k, each in enumerate(phases.phases):
            with _in_phase(b, phase, k):
                at, run, taken = _Rows(b, lanes), on_vectors(each.rows), set(each.rows.arguments)
                at.add("all of rows", values, row_bytes)
                at.add("what is saved", saved, -(-len(saved_rows) // lanes.count) * vector)

                def body(at=at, k=k, run=run, taken=taken):
                    for n in range(len(sums) if k == 0 else 0):
                        at.store(None, "all of rows", len(names) + n)
                    given = {name: at.load("all of rows", n) for n, name in enumerate(names) if name in taken}
                    for n, name in enumerate(sums, len(names)):
                        if name in taken:
                            total = lanes.total(b, at.load("all of rows", n).value)
                            given[name] = Vector(b, lanes, b.fdiv(total, whole))
                    if backward:
                        numbers = enumerate(saved_rows)
                        given |= {name: at.load_number("what is saved", n) for n, name in numbers if name in taken}
                    found = run(given)
                    for n, name in enumerate(names):
                        if name in found:
                            at.store(found[name], "all of rows", n)
                    for n, name in enumerate(saved_rows):
                        if name in found:
                            at.store_number(found[name], "what is saved", n)

                at.loop(rows, body)

    return build


def forward(lanes: Lanes, cell: Functions, save: bool, streams: bool = False) -> Builder:
    """The new states and, if `save`, what backward loads (rows, K, lanes): past the caches if it `streams`. For a cell
    that takes means this is one phase of it, see `cells.phases`.
    """
    layout, vector, phases = cell.layout, lanes.size * lanes.count, cell.saving if save else cell.forward
    saved_units = layout.saved_units if save else ()

    def build(b, rows, row, unit, preact, saved, table, phase=None, kept=None, of_rows=None, row_bytes=None, valid=None):
        for k, each in enumerate(phases.phases):
            with _in_phase(b, phase, k):
                build_phase(b, each.units, rows, row, unit, preact, saved, table, kept, of_rows, row_bytes, valid)

    def build_phase(b, function, rows, row, unit, preact, saved, table, kept, of_rows, row_bytes, valid):
        at, taken, run = _Rows(b, lanes), set(function.arguments), on_vectors(function)
        inside = lanes.first(b, valid) if phases.sums else None
        at.add("all sums", preact, len(layout.sums) * vector)
        at.add_table(forward_table(layout), {*taken, *layout.states}, table, row, unit)
        if saved_units:
            at.add("what is saved", saved, len(saved_units) * vector)
        means = _Means(at, phases, kept, of_rows, row_bytes)

        def body():
            given = {name: at.load("what is saved", k) for k, name in enumerate(saved_units) if name in taken}
            given |= {  # an argument may be what is saved: it is there in the first phase, too
                f"{gate}_pre": at.load("all sums", k) for k, gate in enumerate(layout.sums) if f"{gate}_pre" in taken
            }
            given |= {name: at.load(name) for name in at.at if name in taken} | means.load(taken)
            found = run(given)
            for state in reversed(layout.states):
                if state in found:
                    at.store(found[state], state)
            for k, name in enumerate(saved_units):
                if name in found:
                    at.store(found[name], "what is saved", k, past_caches=vector if streams else 0)
            means.store(found, inside)

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

    phases, saved_units = cell.backward, layout.saved_units

    def build(
        b, rows, row, unit, valid, dh, saved, dpreact, dinputs, first_carried, carried_state, table, phase=None,
        kept=None, of_rows=None, row_bytes=None,
    ):  # fmt: skip
        inside = lanes.first(b, valid)
        for k, each in enumerate(phases.phases):
            with _in_phase(b, phase, k):
                at = _Rows(b, lanes)
                at.add("dh of the step after", dh, 4 * vector)
                at.add_table(backward_table(layout), {*each.units.arguments, OUTSIDE}, table, row, unit)
                at.add("what is saved", saved, len(saved_units) * vector)
                at.add("all terms", dpreact, len(terms) * vector)
                at.add("all dinputs", dinputs, len(layout.inputs) * vector)
                for n, state in enumerate(carried):
                    at.add(f"carried {state}", b.add(first_carried, b.mul(carried_state, I64(n))), vector)
                means = _Means(at, phases, kept, of_rows, row_bytes)
                at.loop(rows, partial(body, at, means, each.units, inside, k == len(phases.phases) - 1))

    def body(at, means, function, inside, is_last):
        taken = set(function.arguments)
        given = {name: at.load("what is saved", k) for k, name in enumerate(saved_units) if name in taken}
        given |= {f"d{name}": at.load("all terms", k) for k, name in enumerate(terms) if f"d{name}" in taken}
        given |= {name: at.load(name) for name in at.at if name in taken} | means.load(taken)
        given |= {f"d{state}": at.load(f"carried {state}") for state in others if f"d{state}" in taken}
        if f"d{first}" in taken:
            given[f"d{first}"] = at.load("dh of the step after") + at.load(OUTSIDE)
        found = on_vectors(function)(given)
        means.store(found, inside)
        for state in carried if is_last else ():
            at.store(found.get(f"d{state}_prev"), f"carried {state}")
        for k, name in enumerate(terms):
            if f"d{name}" in found or (is_last and f"d{name}" not in results):
                at.store(found.get(f"d{name}"), "all terms", k, inside)
        for k, name in enumerate(layout.inputs if is_last else ()):
            at.store(found.get(f"d{name}"), "all dinputs", k)

    results = {name for each in phases.phases for name in each.units.results}
    return build


def builders(lanes: Lanes, cell: Functions) -> Builders:
    rows, (of_forward, of_backward) = cell.layout.saved_rows, cell.phases
    takes, takes_back = 11 if of_forward > 1 else 6, 15 if of_backward > 1 else 11
    made: Builders = {
        "cell_forward": (takes, forward(lanes, cell, False)),
        "cell_forward_saving": (takes, forward(lanes, cell, True)),
        "cell_forward_streaming": (takes, forward(lanes, cell, True, streams=True)),
        "cell_backward": (takes_back, backward(lanes, cell)),
    }
    if of_forward > 1:
        made["rows_forward"] = 6, of_rows(lanes, cell.forward, (), False)
        made["rows_forward_saving"] = 6, of_rows(lanes, cell.saving, rows, False)
    if of_backward > 1:
        made["rows_backward"] = 6, of_rows(lanes, cell.backward, rows, True)
    return made


NAMES = (
    "cell_forward", "cell_forward_saving", "cell_forward_streaming", "cell_backward",
    "rows_forward", "rows_forward_saving", "rows_backward",
)  # fmt: skip
