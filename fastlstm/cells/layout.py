"""What a kernel has to know of a cell beside its functions: pre-activations, saved values, carried gradients."""

from collections.abc import Mapping, Sequence

from fastlstm.cells.derive import Derived


class Layout:
    """How the values of a cell, as it was declared, lie side by side.

    A *pre-activation* is what the products of x, of h or of both add up to for one gate. Those of x alone come first,
    then those of both, then those of h alone, so that each product fills a contiguous range. weight_ih has a block of H
    rows for each pre-activation of x, and weight_hh for each of h, in the order in which the cell declares its gates.

    Attributes:
        preacts: the gates in the order of their pre-activations.
        x_preacts, h_preacts: the ranges of them that x and h are multiplied for. `shared_preacts` is their overlap.
        joint: whether both products add to every pre-activation, so that both weights have the same order.
        blocks_ih, blocks_hh: the block of rows of weight_ih or weight_hh, and of the bias, for each pre-activation.
        rows_ih, rows_hh: the inverse of these, by which gradients get back into the order of the weights.
        states: the states, of which the first is the output.
        saved: the values that forward saves for backward, (T, B, H) each. `saved_rows` are the same for all units.
        sequences: the states but the first that backward reads at all steps.
        carried: the states whose gradient goes to the step before elementwise, the first's beside that by weight_hh.
        params, inputs: vectors (H,), and values (T, B, H). Gradients of params are summed over steps and rows.
        product_groups: the names of the products of each value, or of all without a gradient, which make one product.
        products: the names of all products, group by group.
        multiplied: for each group the index of the value among `saved_units`.
    """

    def __init__(
        self,
        derived: Derived,
        gates: Mapping[str, str],
        states: Sequence[str],
        params: Sequence[str],
        inputs: Sequence[str],
    ) -> None:
        self.preacts = preacts = tuple(gate for kind in ("x", "xh", "h") for gate, of in gates.items() if of == kind)
        declared_x, declared_h = ([gate for gate, of in gates.items() if operand in of] for operand in "xh")
        self.x_preacts, self.h_preacts = range(len(declared_x)), range(len(preacts) - len(declared_h), len(preacts))
        self.shared_preacts = range(self.h_preacts.start, self.x_preacts.stop)
        self.joint = self.x_preacts == self.h_preacts
        self.blocks_ih = tuple(declared_x.index(preacts[k]) for k in self.x_preacts)
        self.blocks_hh = tuple(declared_h.index(preacts[k]) for k in self.h_preacts)
        self.rows_ih = tuple(preacts.index(gate) for gate in declared_x)
        self.rows_hh = tuple(preacts.index(gate) - self.h_preacts.start for gate in declared_h)
        self.states, self.params, self.inputs = tuple(states), tuple(params), tuple(inputs)
        self.saved, self.saved_rows = derived.saved, derived.saved_rows
        self.saved_units = tuple(name for name in self.saved if name not in self.saved_rows)
        self.sequences = tuple(s for s in states[1:] if {s, f"{s}_prev"} & set(derived.states_read))
        self.carried = tuple(s for s in states if f"d{s}_prev" in derived.backward.results)
        groups: dict[tuple[str, bool], tuple[str, ...]] = {}
        for name, value in derived.multiplied.items():
            key = value, f"d{name}" in derived.backward.results
            groups[key] = (*groups.get(key, ()), name)
        self.product_groups = tuple(groups.values())
        self.products = tuple(name for group in self.product_groups for name in group)
        self.multiplied = tuple(self.saved_units.index(value) for value, _ in groups)

    def saved_vectors(self, lanes: int) -> int:
        """Return a row's vectors of saved values in a panel, no fewer than one more panel needs for `saved_rows`."""
        return max(len(self.saved_units), -(-len(self.saved_rows) // lanes))
