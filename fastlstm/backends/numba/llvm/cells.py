"""The elementwise part of a step as LLVM functions, made from what is derived from a cell.

They have the arguments of the other primitives: 64-bit integers. A function takes one vector of units for some batch
rows. What there are as many of as the cell has states or inputs is found by a table of int64, in the order of
`forward_table` and `backward_table`: the address of row 0 and unit 0, and the bytes from one row to the next.
"""

from dataclasses import dataclass
from functools import cache, partial

from fastlstm.backends.numba.llvm.loops import Builder, Builders
from fastlstm.backends.numba.llvm.means import AcrossPhases, in_phase, of_rows, on_vectors
from fastlstm.backends.numba.llvm.pointers import RowPointers
from fastlstm.backends.numba.llvm.simd import I64, Lanes
from fastlstm.cells.emit import python
from fastlstm.cells.layout import Layout
from fastlstm.cells.phases import Phases, in_phases
from fastlstm.cells.spec import Cell

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
        in_phases(forward, [*cell.states, *layout.saved], layout.saved_rows, early=layout.saved_units),
        in_phases(backward, backward.results, layout.saved_rows, early=terms),
    )
    source = "\n".join([python(forward), python(backward), repr(vars(cell.layout))])
    takes = tuple(forward.arguments), tuple(backward.arguments)
    return Functions(layout, source, *passes, takes)


def forward_table(layout: Layout) -> list[str]:
    """Each state before the step and after it, then inputs and params."""
    states = [name for state in layout.states for name in (f"{state}_prev", state)]
    return [*states, *layout.inputs, *layout.params]


def backward_table(layout: Layout) -> list[str]:
    """`forward_table`, then the gradients that come from outside to the first state."""
    return [*forward_table(layout), OUTSIDE]


def forward(lanes: Lanes, cell: Functions, save: bool, streams: bool = False) -> Builder:
    """The new states and, if `save`, what backward loads (rows, K, lanes): past the caches if it `streams`. For a cell
    that takes means this is one phase of it, see `cells.phases`.
    """
    layout, vector, phases = cell.layout, lanes.size * lanes.count, cell.saving if save else cell.forward
    saved_units = layout.saved_units if save else ()

    def build(
        b, rows, row, unit, preact, saved, table, phase=None, later=None, shared=None, row_stride=None, valid=None
    ):
        for k, each in enumerate(phases.phases):
            with in_phase(b, phase, k):
                build_phase(b, each.units, rows, row, unit, preact, saved, table, later, shared, row_stride, valid)

    def build_phase(b, function, rows, row, unit, preact, saved, table, later, shared, row_stride, valid):
        at, taken, run = RowPointers(b, lanes), set(function.arguments), on_vectors(function)
        inside = lanes.first(b, valid) if phases.sums else None
        at.add("all sums", preact, len(layout.sums) * vector)
        at.add_table(forward_table(layout), {*taken, *layout.states}, table, row, unit)
        if saved_units:
            at.add("what is saved", saved, layout.saved_vectors(lanes.count) * vector)
        phased = AcrossPhases(at, phases, later, shared, row_stride)

        def body():
            given = {name: at.load("what is saved", k) for k, name in enumerate(saved_units) if name in taken}
            given |= {  # an argument may be what is saved: it is there in the first phase, too
                f"{gate}_pre": at.load("all sums", k) for k, gate in enumerate(layout.sums) if f"{gate}_pre" in taken
            }
            given |= {name: at.load(name) for name in at.at if name in taken} | phased.load(taken)
            found = run(given)
            for state in reversed(layout.states):
                if state in found:
                    at.store(found[state], state)
            for k, name in enumerate(saved_units):
                if name in found:
                    at.store(found[name], "what is saved", k, past_caches=vector if streams else 0)
            phased.store(found, inside)

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
        later=None, shared=None, row_stride=None,
    ):  # fmt: skip
        inside = lanes.first(b, valid)
        for k, each in enumerate(phases.phases):
            with in_phase(b, phase, k):
                at = RowPointers(b, lanes)
                at.add("dh of the step after", dh, 4 * vector)
                at.add_table(backward_table(layout), {*each.units.arguments, OUTSIDE}, table, row, unit)
                at.add("what is saved", saved, layout.saved_vectors(lanes.count) * vector)
                at.add("all terms", dpreact, len(terms) * vector)
                at.add("all dinputs", dinputs, len(layout.inputs) * vector)
                for n, state in enumerate(carried):
                    at.add(f"carried {state}", b.add(first_carried, b.mul(carried_state, I64(n))), vector)
                phased = AcrossPhases(at, phases, later, shared, row_stride)
                at.loop(rows, partial(body, at, phased, each.units, inside, k == len(phases.phases) - 1))

    def body(at, phased, function, inside, is_last):
        taken = set(function.arguments)
        given = {name: at.load("what is saved", k) for k, name in enumerate(saved_units) if name in taken}
        given |= {f"d{name}": at.load("all terms", k) for k, name in enumerate(terms) if f"d{name}" in taken}
        given |= {name: at.load(name) for name in at.at if name in taken} | phased.load(taken)
        given |= {f"d{state}": at.load(f"carried {state}") for state in others if f"d{state}" in taken}
        if f"d{first}" in taken:
            given[f"d{first}"] = at.load("dh of the step after") + at.load(OUTSIDE)
        found = on_vectors(function)(given)
        phased.store(found, inside)
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
    rows, saved = cell.layout.saved_rows, cell.layout.saved_vectors(lanes.count)
    of_forward, of_backward = cell.phases
    takes, takes_back = 11 if of_forward > 1 else 6, 15 if of_backward > 1 else 11
    made: Builders = {
        "cell_forward": (takes, forward(lanes, cell, False)),
        "cell_forward_saving": (takes, forward(lanes, cell, True)),
        "cell_forward_streaming": (takes, forward(lanes, cell, True, streams=True)),
        "cell_backward": (takes_back, backward(lanes, cell)),
    }
    if of_forward > 1:
        made["rows_forward"] = 9, of_rows(lanes, cell.forward, (), 0, False)
        made["rows_forward_saving"] = 9, of_rows(lanes, cell.saving, rows, saved, False)
    if of_backward > 1:
        made["rows_backward"] = 9, of_rows(lanes, cell.backward, rows, saved, True)
    return made


NAMES = (
    "cell_forward", "cell_forward_saving", "cell_forward_streaming", "cell_backward",
    "rows_forward", "rows_forward_saving", "rows_backward",
)  # fmt: skip
