"""A derived function in phases: what can be computed until the next means over a row's units are known.

Each phase has two functions. `rows` is of what is the same for all units of a row: it gets the means that the phase
before ended in, and is computed once a row. `units` is elementwise, as a whole derived function is without means. Values
of it that a later phase needs are kept, or computed again: a minimum cut decides, phase by phase from the last on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

from fastlstm.cells.emit import Function
from fastlstm.cells.graph import COMPARISONS, Node, in_order
from fastlstm.cells.saving import Costs, _cut, per_row

KEEP = 4.0  # to keep a value for a later phase, in additions: a store and a load in the first or second cache


@dataclass(frozen=True)
class Phase:
    rows: Function
    units: Function


@dataclass(frozen=True)
class Phases:
    """A function's phases.

    Attributes:
        of_rows: the names of what `rows` gives and any later function may take, in the order in which a row has them.
        sums: what `units` gives to be summed over the units; means of the same names are what `rows` takes.
        kept: what `units` gives for later phases.
    """

    phases: tuple[Phase, ...]
    of_rows: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def in_phases(
    function: Function,
    results: Iterable[str],
    given_rows: Iterable[str] = (),
    early: Iterable[str] = (),
    once: Iterable[str] = (),
) -> Phases:
    """Split a function of which some `results` are wanted. `given_rows`: arguments that are the same for all units.
    `early`: results that may be given as soon as they are known, and be read back by later phases. `once`: results that
    are the same for all units, and that `rows` gives; if any others are, `units` gives them.
    """
    arguments, wanted, costs = function.arguments, {name: function.results[name] for name in results}, Costs()
    given, nodes = set(arguments.values()), in_order(wanted.values(), arguments.values())
    rows, depth = per_row(nodes, {arguments[name] for name in given_rows if name in arguments}), dict[Node, int]()
    for n in nodes:
        below = 0 if n in given else max((depth[a] for a in n.args), default=0)
        depth[n] = below + (n.op == "mean" and n not in given)
    last = max(depth.values(), default=0)
    means = [n for n in nodes if n.op == "mean" and n not in given]
    asked = {a for n in nodes if n not in rows and n not in given for a in n.args} | set(wanted.values())
    of_rows = {
        f"row{k}": n
        for k, n in enumerate(n for n in nodes if n in rows and (n in asked or (n.op == "mean" and n not in given)))
    }
    of_results = {name: wanted[name] for name in once}
    sums = {f"sum{k}": n for k, n in enumerate(means)}

    roots: list[list[Node]] = [[n.args[0] for n in means if depth[n] == k + 1] for k in range(last + 1)]
    soon = {name: n for name, n in wanted.items() if name in set(early) and n not in rows and not n.is_constant()}
    there, kept = {*given, *of_rows.values()}, {n: name for name, n in soon.items()}
    roots[last] += [n for name, n in wanted.items() if n not in rows and name not in soon and name not in of_results]
    for n in soon.values():
        roots[depth[n]].append(n)
    for k in range(last, 0, -1):
        early = [n for n in in_order(roots[k], there) if depth[n] < k and not n.is_constant()]
        needed = {n for n in roots[k] if depth[n] < k}
        needed |= {a for n in in_order(roots[k], there) if depth[n] == k and n not in there for a in n.args}
        needed = {n for n in needed if n in set(early)}
        load = {n: 1.0 if n in given else 0.0 if n in there else 1.0 if n in kept else KEEP for n in early}
        load |= {n: inf for n in early if n.op in COMPARISONS}
        compute = {n: inf if n in there else costs.of(n) for n in early}
        for n in _cut(early, needed, load, compute)[1]:
            if n not in there and n not in kept:
                kept[n] = f"kept{len(kept) - len(set(soon.values()))}"
                roots[depth[n]].append(n)

    def made(name: str, from_: Mapping[str, Node], to: Mapping[str, Node]) -> Function:
        used = set(in_order(to.values(), from_.values()))
        return Function(name, {key: n for key, n in from_.items() if n in used}, dict(to))

    phases = []
    for k in range(last + 1):
        before = {name: n for name, n in of_rows.items() if depth[n] < k}
        now = {name: n for name, n in of_rows.items() if depth[n] == k}
        means_now = {name: n for name, n in sums.items() if depth[n] == k}
        rows_given = {name: arguments[name] for name in given_rows if name in arguments}
        results_now = {name: n for name, n in of_results.items() if depth[n] == k}
        of_row = made("rows", {**before, **means_now, **rows_given}, {**now, **results_now})
        known = {**{name: n for name, n in arguments.items() if n not in rows}, **before, **now}
        known |= {name: n for n, name in kept.items() if depth[n] < k}
        to = {name: n.args[0] for name, n in sums.items() if depth[n] == k + 1}
        to |= {name: n for n, name in kept.items() if depth[n] == k}
        to |= {name: n for name, n in soon.items() if depth[n] == k}
        to |= {name: n for name, n in wanted.items() if k == last and name not in soon and name not in of_results}
        phases.append(Phase(of_row, made("units", known, to)))
    return Phases((*phases,), (*of_rows,), (*sums,), tuple(name for name in kept.values() if name not in soon))
