"""Writes cells.h from fastlstm.cells: `python csrc/generate.py`."""

from collections.abc import Sequence
from pathlib import Path

from fastlstm.cells import Cell, gru, lstm
from fastlstm.cells.emit import statements

CELLS = lstm, gru  # in the order of enum fastlstm_cell
HEAD = """\
// What the kernels know of each cell: how its values lie, and its arithmetic. generate.py writes this file from
// fastlstm/cells, and a test compares the two.
//
// A cell has S pre-activations. x is multiplied for the first X of them, and h for the last Y. BLOCKS_IH and BLOCKS_HH
// have, for each of these, its block of H rows of weight_ih and weight_hh. The first of the STATES is h. The cell reads
// the states from FIRST_READ on, and carries their gradients to the step before. The forward pass stores SAVED values
// for the backward pass.
#pragma once
"""


def struct(cell: Cell) -> str:
    """Return the C++ of one cell.

    Raises:
        ValueError: if the cell reads or carries a value that the kernels do not support.
    """
    derived, layout, kind = cell.derived(), cell.layout, cell.name.capitalize()
    elementwise = cell.states[len(cell.states) - len(layout.carried) :]
    read = {name for function in (derived.forward, derived.backward) for name in function.arguments}
    unsupported = {*cell.states, *(f"{state}_prev" for state in cell.states if state not in elementwise)}
    if layout.carried != elementwise or read & unsupported or layout.params or layout.inputs:
        raise ValueError(f"the kernels have no place for what cell {cell.name} reads or carries")

    def array_items(array: str, names: Sequence[str]) -> dict[str, str]:
        return {name: f"{array}[{k}]" for k, name in enumerate(names)}

    def method(name: str, head: str, arguments: dict[str, str], *results: dict[str, str]) -> str:
        function = getattr(derived, name)
        lines, values = statements(function)
        expressions = dict(zip(function.results, values))
        body = [f"const V {', '.join(f'{a} = {arguments[a]}' for a in function.arguments)}"]
        body += [f"auto {variable} = {value}" for variable, value in lines]
        body += [", ".join(f"{target} = {expressions[a]}" for a, target in part.items()) for part in results]
        text = "".join(f"        {line};\n" for line in body)
        return f"    template <class V> static void {name}({head}) {{\n{text}    }}\n"

    prev = {a: item for a, item in array_items("prev", [f"{state}_prev" for state in cell.states]).items() if a in read}
    d_prev = array_items("d_prev", [f"d{state}_prev" for state in cell.states])
    forward = method(
        "forward",
        "const V *preact, const V *prev, V *next, V *saved",
        {**array_items("preact", [f"{gate}_pre" for gate in layout.preacts]), **prev},
        array_items("next", cell.states),
        array_items("saved", layout.saved),
    )
    backward = method(
        "backward",
        "const V *d, const V *saved, const V *prev, V *dpreact, V *d_prev",
        {**array_items("d", [f"d{state}" for state in cell.states]), **array_items("saved", layout.saved), **prev},
        array_items("dpreact", [f"d{gate}_pre" for gate in layout.preacts]),
        {a: item for a, item in d_prev.items() if a in derived.backward.results},
    )
    sizes = {"S": layout.preacts, "X": layout.x_preacts, "Y": layout.h_preacts}
    sizes |= {"STATES": cell.states, "SAVED": layout.saved}
    numbers = {name: len(values) for name, values in sizes.items()}
    numbers["FIRST_READ"] = len(cell.states) - len(elementwise)
    blocks_ih, blocks_hh = (", ".join(map(str, blocks)) for blocks in (layout.blocks_ih, layout.blocks_hh))
    return (
        f"struct {kind} {{  // pre-activations: {', '.join(layout.preacts)}\n"
        f"    static constexpr int {', '.join(f'{name} = {value}' for name, value in numbers.items())};\n"
        f"    static constexpr int BLOCKS_IH[X] = {{{blocks_ih}}}, BLOCKS_HH[Y] = {{{blocks_hh}}};\n"
        f"{forward}{backward}}};\n"
    )


def header() -> str:
    """Return the text of cells.h."""
    return "\n".join([HEAD, *map(struct, CELLS)])


if __name__ == "__main__":
    (Path(__file__).parent / "cells.h").write_text(header())
