"""What a kernel has to know of a cell beside its functions: sums, what lies in memory, what is carried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fastlstm.cells.derive import Derived


@dataclass(frozen=True)
class Layout:
    """How a cell's values lie side by side.

    A *sum* is what a product adds to: one pre-activation of H units. Sums of x alone come first, then those of both,
    then those of h alone. Each product then fills a contiguous range of them. weight_ih has a block of H rows for each
    sum of x, and weight_hh for each sum of h, both in the order in which the cell declares its gates.

    Attributes:
        sums: the gates in the order of the sums.
        of_x, of_h: the ranges of sums that x and h are multiplied for. They overlap in the sums of both.
        blocks_ih, blocks_hh: for each sum of its range which block of rows of weight_ih or weight_hh, and of the bias.
        rows_ih, rows_hh: the inverse of these, by which gradients get back into the order of the weights.
        states: the states, of which the first is the output.
        saved: what forward leaves for backward, (T, B, H) each.
        sequences: the states but the first that backward reads at all steps.
        carried: the states whose gradient goes to the step before elementwise. Where the first is among them, the
            product with weight_hh is added to it.
        params, inputs: vectors (H,), and values (T, B, H). Gradients of params are summed over steps and rows.
    """

    sums: tuple[str, ...]
    of_x: range
    of_h: range
    blocks_ih: tuple[int, ...]
    blocks_hh: tuple[int, ...]
    rows_ih: tuple[int, ...]
    rows_hh: tuple[int, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    sequences: tuple[str, ...]
    carried: tuple[str, ...]
    params: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def of_both(self) -> range:
        """The sums that both products add to."""
        return range(self.of_h.start, self.of_x.stop)

    @cached_property
    def joint(self) -> bool:
        """Whether both products add to every sum, so that both weights have the same order."""
        return self.of_x == self.of_h


def layout(
    derived: Derived,
    gates: Mapping[str, str],
    states: Sequence[str],
    params: Sequence[str],
    inputs: Sequence[str],
) -> Layout:
    """The layout of a cell as it was declared."""
    sums = tuple(gate for kind in ("x", "xh", "h") for gate, of in gates.items() if of == kind)
    declared = {operand: [gate for gate, of in gates.items() if operand in of] for operand in "xh"}
    number = {operand: len(declared[operand]) for operand in "xh"}
    of_x, of_h = range(number["x"]), range(len(sums) - number["h"], len(sums))
    return Layout(
        sums,
        of_x,
        of_h,
        tuple(declared["x"].index(sums[k]) for k in of_x),
        tuple(declared["h"].index(sums[k]) for k in of_h),
        tuple(sums.index(gate) for gate in declared["x"]),
        tuple(sums.index(gate) - of_h.start for gate in declared["h"]),
        tuple(states),
        derived.saved,
        tuple(state for state in states[1:] if {state, f"{state}_prev"} & set(derived.states_read)),
        tuple(state for state in states if f"d{state}_prev" in derived.backward.results),
        tuple(params),
        tuple(inputs),
    )
