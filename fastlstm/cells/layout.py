"""What a kernel has to know of a cell beside its functions: sums, what lies in memory, what is carried."""

from collections.abc import Mapping, Sequence

from fastlstm.cells.derive import Derived


class Layout:
    """How the values of a cell, as it was declared, lie side by side.

    A *sum* is what a product adds to: one pre-activation of H units. Sums of x alone come first, then those of both,
    then those of h alone. Each product then fills a contiguous range of them. weight_ih has a block of H rows for each
    sum of x, and weight_hh for each sum of h, both in the order in which the cell declares its gates.

    Attributes:
        sums: the gates in the order of the sums.
        of_x, of_h: the ranges of sums that x and h are multiplied for. They overlap in the sums of both, `of_both`.
        joint: whether both products add to every sum, so that both weights have the same order.
        blocks_ih, blocks_hh: for each sum of its range which block of rows of weight_ih or weight_hh, and of the bias.
        rows_ih, rows_hh: the inverse of these, by which gradients get back into the order of the weights.
        states: the states, of which the first is the output.
        saved: what forward leaves for backward, (T, B, H) each, of which `saved_rows` are the same for all units.
        sequences: the states but the first that backward reads at all steps.
        carried: the states whose gradient goes to the step before elementwise. Where the first is among them, the
            product with weight_hh is added to it.
        params, inputs: vectors (H,), and values (T, B, H). Gradients of params are summed over steps and rows.
    """

    def __init__(
        self,
        derived: Derived,
        gates: Mapping[str, str],
        states: Sequence[str],
        params: Sequence[str],
        inputs: Sequence[str],
    ) -> None:
        self.sums = sums = tuple(gate for kind in ("x", "xh", "h") for gate, of in gates.items() if of == kind)
        declared_x, declared_h = ([gate for gate, of in gates.items() if operand in of] for operand in "xh")
        self.of_x, self.of_h = range(len(declared_x)), range(len(sums) - len(declared_h), len(sums))
        self.of_both, self.joint = range(self.of_h.start, self.of_x.stop), self.of_x == self.of_h
        self.blocks_ih = tuple(declared_x.index(sums[k]) for k in self.of_x)
        self.blocks_hh = tuple(declared_h.index(sums[k]) for k in self.of_h)
        self.rows_ih = tuple(sums.index(gate) for gate in declared_x)
        self.rows_hh = tuple(sums.index(gate) - self.of_h.start for gate in declared_h)
        self.states, self.params, self.inputs = tuple(states), tuple(params), tuple(inputs)
        self.saved, self.saved_rows = derived.saved, derived.saved_rows
        self.saved_units = tuple(name for name in self.saved if name not in self.saved_rows)
        self.sequences = tuple(s for s in states[1:] if {s, f"{s}_prev"} & set(derived.states_read))
        self.carried = tuple(s for s in states if f"d{s}_prev" in derived.backward.results)

    def saved_vectors(self, lanes: int) -> int:
        """Return how many vectors a row has of each panel's saved values: one for each value of a unit. The values that
        a row's units share are as if of one more panel, so there are no fewer than hold these.
        """
        return max(len(self.saved_units), -(-len(self.saved_rows) // lanes))
