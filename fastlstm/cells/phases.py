"""A derived function in phases: what can be computed until the next means over a row's units are known.

Each phase has two functions. `rows` is of what is the same for all units of a row: it gets the means that the phase
before ended in, and is computed once a row. `units` is elementwise, as a whole derived function is without means. If a
later phase needs a value of it, the value is kept, or computed again: a minimum cut decides, phase by phase from the
last on.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

from fastlstm.cells.emit import Function
from fastlstm.cells.graph import COMPARISONS, MEANS, Node, in_order
from fastlstm.cells.saving import Costs, cut

KEEP = 4.0  # to keep a value for a later phase, in additions: a store and a load in the first or second cache


@dataclass(frozen=True)
class Phase:
    """One phase of a derived function.

    Attributes:
        rows: gives numbers that all units of a row share, of such numbers and means.
        units: gives values of each unit.
        of_heads: the places in `Phases.kept` of values in whose place the phase begins by putting their heads' means.
    """

    rows: Function
    units: Function
    of_heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Phases:
    """A function's phases.

    Attributes:
        of_rows: the names of what `rows` gives and any later function may take, in the order in which a row has them.
        sums: what `units` gives to be summed over the units; means of the same names are what `rows` takes.
        kept: what `units` gives for later phases, and at last what means of heads are taken of.
    """

    phases: tuple[Phase, ...]
    of_rows: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def in_phases(
    function: Function, results: Iterable[str], rows: Iterable[str] = (), early: Iterable[str] = ()
) -> Phases:
    """Split a derived function.

    Args:
        results: the names of those of its results that are wanted.
        rows: the arguments and results that are one number for each row. The functions `rows` take and give these.
        early: the results that may be given as soon as they are known, and be read back by later phases.
    """
    arguments, rows, costs = function.arguments, set(rows), Costs()
    wanted = {name: function.results[name] for name in results}
    mark = ""  # names are none of a cell's own
    while any(re.fullmatch(rf"{mark}(row|sum|head|kept)\d+", name) for name in (*arguments, *wanted)):
        mark += "_"
    given, nodes = set(arguments.values()), in_order(wanted.values(), arguments.values())
    depth: dict[Node, int] = {}  # the phase from whose begin, or in which, a value is known
    for n in nodes:
        below = 0 if n in given else max((depth[a] for a in n.args), default=0)
        depth[n] = below + (n.op in MEANS and n not in given)
    means, of_heads = ([n for n in nodes if n.op == op and n not in given] for op in MEANS)
    shared = {n for n in nodes if n.per_row and not n.is_constant()}
    of_units = {name: n for name, n in wanted.items() if name not in rows}
    asked = {a for n in nodes if n not in shared and n not in given for a in n.args} | {*of_units.values(), *means}
    row_values = shared & asked
    of_rows = {f"{mark}row{k}": n for k, n in enumerate(n for n in nodes if n in row_values)}
    sums = {f"{mark}sum{k}": n for k, n in enumerate(means)}
    head_means = {f"{mark}head{k}": n for k, n in enumerate(of_heads)}
    # kernels of one phase know nothing that is of a row: a function that only reads such numbers has two
    last = max(depth.values(), default=0) or int(bool(of_rows))
    soon = {name: n for name, n in of_units.items() if name in set(early) and not n.is_constant()}

    # what a phase gives that is not the same for all units, and what it can read from an earlier one
    roots = [[n.args[0] for n in (*means, *of_heads) if depth[n] == k + 1] for k in range(last + 1)]
    roots[last] += [n for name, n in of_units.items() if name not in soon]
    for n in soon.values():
        roots[depth[n]].append(n)
    there, stored = {*given, *row_values, *of_heads}, {n: name for name, n in soon.items()}
    kept: dict[Node, str] = {}
    for k in range(last, 0, -1):
        inside = in_order(roots[k], there)
        before = [n for n in inside if depth[n] < k and not n.is_constant()]
        needed = {n for n in roots[k] if depth[n] < k}
        needed |= {a for n in inside if depth[n] == k and n not in there for a in n.args}
        load = {n: 1.0 if n in given or n in stored or n in kept else KEEP for n in before}
        load |= {n: 0.0 for n in before if n in row_values} | {n: inf for n in before if n.op in COMPARISONS}
        compute = {n: inf if n in there else costs.of(n) for n in before}
        for n in cut(before, needed.intersection(before), load, compute)[1]:
            if n not in there and n not in stored and n not in kept:
                kept[n] = f"{mark}kept{len(kept)}"
                roots[depth[n]].append(n)

    def made(name: str, from_: Mapping[str, Node], to: Mapping[str, Node]) -> Function:
        used = set(in_order(to.values(), from_.values()))
        return Function(name, {key: n for key, n in from_.items() if n in used}, dict(to))

    def known_in(k: int, values: Mapping[str, Node]) -> dict[str, Node]:
        return {name: n for name, n in values.items() if depth[n] == k}

    phases, of_earlier = list[Phase](), dict[str, Node]()
    all_kept = {name: n for n, name in (stored | kept).items()}
    for k in range(last + 1):
        now = known_in(k, of_rows)
        of_row = {name: n for name, n in arguments.items() if name in rows} | of_earlier | known_in(k, sums)
        row_results = {name: n for name, n in wanted.items() if name in rows}
        known = {name: n for name, n in arguments.items() if name not in rows} | of_earlier | now
        known |= {name: n for name, n in all_kept.items() if depth[n] < k}
        known |= {name: n for name, n in head_means.items() if depth[n] <= k}
        to = {name: n.args[0] for name, n in (sums | head_means).items() if depth[n] == k + 1}
        to |= known_in(k, all_kept | soon)
        to |= {name: n for name, n in of_units.items() if k == last and name not in soon}
        begun = tuple(len(kept) + j for j, n in enumerate(of_heads) if depth[n] == k)
        phases.append(Phase(made("rows", of_row, now | known_in(k, row_results)), made("units", known, to), begun))
        of_earlier |= now
    return Phases((*phases,), (*of_rows,), (*sums,), (*kept.values(), *head_means))
