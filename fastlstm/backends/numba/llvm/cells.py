"""The elementwise part of a step as LLVM functions, of one vector of units, from a cell's derived functions. A pointer
table of int64, in the order of `forward_table` and `backward_table`, has the states, inputs and gradients, whose number
depends on the cell: the address of row 0 and unit 0, and the row stride.
"""

from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter

from fastlstm.backends.numba.llvm.loops import Builder, Builders
from fastlstm.backends.numba.llvm.means import AcrossPhases, in_phase, of_rows, on_vectors
from fastlstm.backends.numba.llvm.pointers import RowPointers
from fastlstm.backends.numba.llvm.simd import I64, VectorType
from fastlstm.cells.emit import python
from fastlstm.cells.layout import Layout
from fastlstm.cells.phases import Phases, in_phases
from fastlstm.cells.spec import Cell

OUTSIDE = "dh from outside"  # a label with blanks names memory that is no value of a cell, so it cannot be one's name


@dataclass(frozen=True)
class Functions:
    """A cell's functions for kernels: `source`, from which primitives are built, and the derived, in phases."""

    layout: Layout
    source: str
    forward: Phases
    saving: Phases
    backward: Phases

    @property
    def phases(self) -> tuple[int, int]:
        """Return the number of phases of a step of the forward pass, and of one of the backward pass."""
        return max(len(self.forward.phases), len(self.saving.phases)), len(self.backward.phases)


@cache
def functions_of(cell: Cell) -> Functions:
    derived, layout = cell.derived(), cell.layout
    forward, backward = derived.forward, derived.backward
    params, groups = [f"d{name}" for name in layout.params], layout.product_groups
    passes = (
        in_phases(forward, cell.states, groups=groups),
        in_phases(forward, [*cell.states, *layout.saved], layout.saved_rows, unread=layout.saved_units, groups=groups),
        in_phases(backward, backward.results, layout.saved_rows, early=terms_of(layout), unread=params, groups=groups),
    )
    source = "\n".join([python(forward), python(backward), repr(vars(cell.layout))])
    return Functions(layout, source, *passes)


def terms_of(layout: Layout) -> list[str]:
    """Return the names of what is summed over steps and rows with products: dpreact, then the gradients of products."""
    return [f"d{gate}_pre" for gate in layout.preacts] + [f"d{name}" for name in layout.products]


def forward_table(layout: Layout) -> list[str]:
    """Return the names in the forward pass's table: each state before the step and after it, inputs, params."""
    states = [name for state in layout.states for name in (f"{state}_prev", state)]
    return [*states, *layout.inputs, *layout.params]


def backward_table(layout: Layout) -> list[str]:
    """Return `forward_table`, then dh from outside, the share of h's gradient that the step after does not send."""
    return [*forward_table(layout), OUTSIDE]


def forward(vtype: VectorType, cell: Functions, save: bool, streams: bool = False) -> Builder:
    """Return the builder of one phase of the forward pass, see `cells.phases`. It stores the new states; if `save` the
    saved values (rows, G, lanes), past the caches if it `streams`; and the operands of products in rows `operand_row`
    bytes apart, groups `operand_bytes` apart. It reads the results of products (rows, products, lanes).
    """
    layout, vector, phases = cell.layout, vtype.size * vtype.count, cell.saving if save else cell.forward
    saved_units, preacts = layout.saved_units if save else (), [f"{gate}_pre" for gate in layout.preacts]

    def build(
        b, rows, row, unit, preact, saved, table, phase=None, later=None, shared=None, row_stride=None, valid=None,
        operands=None, operand_bytes=None, operand_row=None, products=None,
    ):  # fmt: skip
        for k, each in enumerate(phases.phases):
            with in_phase(b, phase, k):
                arrays = RowPointers(b, vtype)
                inside = vtype.first_lanes(b, valid) if phases.sums else None
                arrays.add("all preacts", preact, len(preacts) * vector)
                arrays.add_table(forward_table(layout), {*each.units.arguments, *layout.states}, table, row, unit)
                if saved_units:
                    arrays.add("saved values", saved, layout.saved_vectors(vtype.count) * vector)
                phased = AcrossPhases(arrays, phases, later, shared, row_stride)
                for group, name in enumerate(phases.operands):
                    if name in each.units.results:
                        arrays.add(name, b.add(operands, b.mul(operand_bytes, I64(group))), operand_row)
                if phases.products:
                    arrays.add("all products", products, len(phases.products) * vector)
                arrays.loop(rows, partial(body, arrays, phased, each.units, inside))

    def body(arrays, phased, function, inside):
        taken = set(function.arguments)
        arguments = {name: arrays.load("all preacts", k) for k, name in enumerate(preacts) if name in taken}
        arguments |= {name: arrays.load(name) for name in arrays.current if name in taken} | phased.load(taken)
        arguments |= {n: arrays.load("all products", k) for k, n in enumerate(phases.products) if n in taken}
        results = on_vectors(function)(arguments)
        for name in phases.operands:
            if name in results:
                arrays.store(results[name], name)
        for state in reversed(layout.states):
            if state in results:
                arrays.store(results[state], state)
        for k, name in enumerate(saved_units):
            if name in results:
                arrays.store(results[name], "saved values", k, past_caches=vector if streams else 0)
        phased.store(results, inside)

    return build


def backward(vtype: VectorType, cell: Functions) -> Builder:
    """Return the builder of one phase of the backward pass. dh (rows, 4, lanes) is the gradient of the first state
    without the part from outside. It stores:

    * dpreact (rows, S, lanes), then gradients of products, zeros from lane `valid` on, since a product sums over them.
    * dinputs (rows, Q, lanes), the gradients of the inputs.
    * the carried gradients (rows, lanes) of a state, in place and `carried_state` bytes apart: those of the inner
      states, then that of the first state if there is one.

    The gradients of the params are added to `param_sums` (P, lanes) of the row's group: row r, counted from the first,
    has them at ``(r & group_mask) * group_stride``. It reads the transposed products (rows, 4, lanes) of gradients of
    products, groups `product_bytes` apart. The first of several phases fetches the saved values `saved_ahead` bytes on.
    """
    layout, vector = cell.layout, vtype.size * vtype.count
    first, *inner = layout.states
    terms = terms_of(layout)
    carried = [*inner, *(state for state in layout.carried if state == first)]

    phases, saved_units = cell.backward, layout.saved_units

    def build(
        b, rows, row, unit, valid, dh, saved, dpreact, param_sums, group_mask, group_stride, dinputs,
        first_carried, carried_state, table, phase=None, later=None, shared=None, row_stride=None, saved_ahead=None,
        products=None, product_bytes=None,
    ):  # fmt: skip
        inside = vtype.first_lanes(b, valid)
        for k, each in enumerate(phases.phases):
            with in_phase(b, phase, k):
                arrays = RowPointers(b, vtype)
                arrays.add("dh of the step after", dh, 4 * vector)
                arrays.add_table(
                    backward_table(layout), {*each.units.arguments, OUTSIDE}, table, row, unit, alike=layout.params
                )
                arrays.add("saved values", saved, layout.saved_vectors(vtype.count) * vector)
                arrays.add("all dpreact", dpreact, len(terms) * vector)
                for group, name in enumerate(phases.products):
                    if name in each.units.arguments:
                        arrays.add(name, b.add(products, b.mul(product_bytes, I64(group))), 4 * vector)
                arrays.add("number of the row", I64(0), 1)
                arrays.add("all dinputs", dinputs, len(layout.inputs) * vector)
                for n, state in enumerate(carried):
                    arrays.add(f"carried {state}", b.add(first_carried, b.mul(carried_state, I64(n))), vector)
                phased = AcrossPhases(arrays, phases, later, shared, row_stride)
                add = partial(add_to_params, arrays, param_sums, group_mask, group_stride)
                ahead = saved_ahead if k == 0 else None
                is_last = k == len(phases.phases) - 1
                arrays.loop(rows, partial(body, arrays, phased, each.units, inside, add, ahead, is_last))

    def add_to_params(arrays, param_sums, group_mask, group_stride, gradients):
        b, name = arrays.b, "sums of the row's group"
        group = b.and_(arrays.current["number of the row"], group_mask)
        arrays.current[name] = b.add(param_sums, b.mul(group, group_stride))
        for k, param in enumerate(layout.params):
            if f"d{param}" in gradients:
                arrays.store(arrays.load(name, k) + gradients[f"d{param}"], name, k)

    def body(arrays, phased, function, inside, add, ahead, is_last):
        taken = set(function.arguments)
        for k, name in enumerate(saved_units):
            if name in read and ahead is not None:
                arrays.prefetch("saved values", k, ahead)
        arguments = {name: arrays.load("saved values", k) for k, name in enumerate(saved_units) if name in taken}
        arguments |= {name: arrays.load("all dpreact", k) for k, name in enumerate(terms) if name in taken}
        arguments |= {name: arrays.load(name) for name in arrays.current if name in taken} | phased.load(taken)
        arguments |= {f"d{state}": arrays.load(f"carried {state}") for state in inner if f"d{state}" in taken}
        if f"d{first}" in taken:
            arguments[f"d{first}"] = arrays.load("dh of the step after") + arrays.load(OUTSIDE)
        gradients = on_vectors(function)(arguments)
        phased.store(gradients, inside)
        for state in carried if is_last else ():
            arrays.store(gradients.get(f"d{state}_prev"), f"carried {state}")
        for k, name in enumerate(terms):
            if name in gradients or (is_last and name not in results):
                arrays.store(gradients.get(name), "all dpreact", k, inside)
        add(gradients)
        for k, name in enumerate(layout.inputs if is_last else ()):
            arrays.store(gradients.get(f"d{name}"), "all dinputs", k)

    read, results = (
        {name for each in phases.phases for name in names(each.units)}
        for names in (attrgetter("arguments"), attrgetter("results"))
    )
    return build


def builders(vtype: VectorType, cell: Functions) -> Builders:
    """Return the builders of a cell's primitives for an element type."""
    rows, saved = cell.layout.saved_rows, cell.layout.saved_vectors(vtype.count)
    forward_phases, backward_phases = cell.phases
    # the arguments of `build` in `forward` and `backward`, those of phases where there are several
    takes, takes_backward = 15 if forward_phases > 1 else 6, 21 if backward_phases > 1 else 14
    builders: Builders = {
        "cell_forward": (takes, forward(vtype, cell, False)),
        "cell_forward_saving": (takes, forward(vtype, cell, True)),
        "cell_forward_streaming": (takes, forward(vtype, cell, True, streams=True)),
        "cell_backward": (takes_backward, backward(vtype, cell)),
    }
    if forward_phases > 1:
        builders["rows_forward"] = 9, of_rows(vtype, cell.forward, (), 0, False)
        builders["rows_forward_saving"] = 9, of_rows(vtype, cell.saving, rows, saved, False)
    if backward_phases > 1:
        builders["rows_backward"] = 9, of_rows(vtype, cell.backward, rows, saved, True)
    return builders


NAMES = (
    "cell_forward", "cell_forward_saving", "cell_forward_streaming", "cell_backward",
    "rows_forward", "rows_forward_saving", "rows_backward",
)  # fmt: skip
