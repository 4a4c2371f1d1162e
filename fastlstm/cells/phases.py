"""A derived function in phases: what can be computed until the next means over a row's units, or products, are known.

Each has two functions: `rows`, of what all units of a row share, which gets the means that the phase before ended in;
and `units`, which is elementwise. If a later phase needs a value of it, a minimum cut decides, phase by phase from the
last on, whether the value is kept or computed again.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from fastlstm.cells.emit import Function
from fastlstm.cells.graph import ACROSS, COMPARISONS, MEANS, PRODUCTS, Node, in_order
from fastlstm.cells.saving import Costs, cut

KEEP = 4.0  # to keep a value for a later phase, in additions: a store and a load in the first or second cache


@dataclass(frozen=True)
class Phase:
    """One phase of a derived function.

    Attributes:
        rows: computes numbers that all units of a row share, from such numbers and from means.
        units: computes values of each unit.
        of_heads: indices into `Phases.kept`. Before `rows` and `units` run, the mean over each head's units replaces
            the values at these indices.
        products: the groups of products whose results are known from this phase on.
    """

    rows: Function
    units: Function
    of_heads: tuple[int, ...] = ()
    products: tuple[int, ...] = ()


@dataclass(frozen=True)
class Phases:
    """A function's phases.

    Attributes:
        of_rows: the names of what `rows` computes and any later function may take, in a row's order.
        sums: the names of what `units` computes to be summed over the units: means in `rows` of the next phase.
        kept: the names of what `units` computes for later phases, and after them of that whose means over heads later
            phases take. Two values may share a name, if the second is computed when nothing reads the first any more.
        operands: the names of what `units` computes to be multiplied, one for each group of products. Backward has
            none: the gradients of products are among its results.
        products: the names of the results of products: one for each product, or, in backward, for each group.
    """

    phases: tuple[Phase, ...]
    of_rows: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()
    products: tuple[str, ...] = ()


def set_depth(node: Node, depth: dict[Node, int]) -> int:
    """Store and return the phase in which a node is known, and those of what it is made from."""
    for n in in_order([node], depth):
        if n not in depth:
            depth[n] = max((depth[a] for a in n.args), default=0) + (n.op in ACROSS)
    return depth[node]


def with_early_means(results: Iterable[Node], arguments: Mapping[Node, Node]) -> list[Node]:
    """Return the results with means of what is known as early as possible: the mean of ``s * a + t * b``, where a row's
    units share s and t, as in a norm's gradient, is made from the means of a and b.

    `arguments`: the input that stands for each argument in what is returned; an argument may be computed from values
    that are no arguments. No operation on it may be simplified to one on these.
    """
    results, new, depth = list(results), dict(arguments), dict[Node, int]()

    def terms_of(op: str, x: Node, *heads: Node) -> list[Node]:
        """Return terms whose sum is the mean of x, none if x is more than a sum of what is known before it."""
        until, factors = set_depth(x, depth), {x: x.graph.constant(1)}
        if until == 0:
            return []
        parts, terms = dict[Node, Node](), list[Node]()  # parts of x by the factor of their mean
        for n in reversed(in_order([x])):  # each before what it is made from
            if n not in factors:
                continue
            a, b, factor = *(*n.args, n, n)[:2], factors.pop(n)
            further: list[tuple[Node, Node]] = []
            if n.per_row:
                terms.append(factor * n)
            elif depth[n] < until:
                part, factor = (-n, factor.args[0]) if factor.op == "neg" else (n, factor)
                parts[factor] = parts[factor] + part if factor in parts else part
            elif n.op in ("add", "sub"):
                further = [(a, factor), (b, factor if n.op == "add" else -factor)]
            elif n.op == "mul" and a.per_row:
                further = [(b, factor * a)]
            elif n.op in ("mul", "div") and b.per_row:
                further = [(a, x.graph.make(n.op, factor, b))]
            else:
                return []
            for arg, times in further:
                factors[arg] = factors[arg] + times if arg in factors else times
        return terms + [factor * x.graph.make(op, part, *heads) for factor, part in parts.items()]

    for n in sorted(in_order(results, arguments), key=lambda n: n.number):  # so that the new ones have the same order
        if n not in arguments:
            node = n.graph.make(n.op, *(new[a] for a in n.args)) if n.args else n
            first, *others = (node.op in MEANS and terms_of(node.op, *node.args)) or [node]
            new[n] = sum(others, start=first)
            new[n].hint = new[n].hint or n.hint
    return [new[n] for n in results]


def in_phases(
    function: Function, results: Iterable[str], rows: Iterable[str] = (), early: Iterable[str] = (),
    unread: Iterable[str] = (), groups: Sequence[tuple[str, ...]] = (),
) -> Phases:  # fmt: skip
    """Split a derived function.

    Args:
        results: the names of those of its results that are wanted.
        rows: the arguments and results that are one number for each row. The functions `rows` take and give these.
        early: the results that may be given as soon as they are known, and be read back by later phases.
        unread: the results that are given as soon as they are known, and that no phase reads back.
        groups: the names of the products of each value that is multiplied.
    """
    inputs = {n: n.graph.stand_in(n) for n in function.arguments.values()}
    arguments = {name: inputs[n] for name, n in function.arguments.items()}
    results, rows, early, leaves = list(results), set(rows), set(early), set(inputs.values())
    wanted = dict(zip(results, with_early_means([function.results[name] for name in results], inputs)))
    mark = ""  # it stands before the names that are made here, so that they differ from all of the cell's
    while any(re.fullmatch(rf"{mark}(row|sum|head|kept|operand|product)\d+", name) for name in (*arguments, *wanted)):
        mark += "_"
    nodes, depth = in_order(wanted.values()), dict[Node, int]()
    for n in nodes:
        set_depth(n, depth)
    means, of_heads = ([n for n in nodes if n.op == op] for op in MEANS)
    operands, product_results, depth_of_group = dict[str, Node](), dict[str, Node](), dict[int, int]()
    all_products = [name for group in groups for name in group]
    for n in (n for n in nodes if n.op in PRODUCTS):
        weight = n.args[1].value
        k = next(k for k, group in enumerate(groups) if weight in group)
        depth_of_group[k] = depth[n]
        if n.op == "product":
            operands[f"{mark}operand{k}"], k = n.args[0], all_products.index(weight)
        product_results[f"{mark}product{k}"] = n
    shared = {n for n in nodes if n.per_row and not n.is_constant()}
    of_units = {name: n for name, n in wanted.items() if name not in rows}
    read_by_units = {a for n in nodes if n not in shared and n not in leaves for a in n.args}
    row_values = shared & (read_by_units | {*of_units.values(), *means})
    of_rows = {f"{mark}row{k}": n for k, n in enumerate(n for n in nodes if n in row_values)}
    sums = {f"{mark}sum{k}": n for k, n in enumerate(means)}
    head_means = {f"{mark}head{k}": n for k, n in enumerate(of_heads)}
    # kernels of one phase know nothing that is of a row: a function that only reads such numbers has two
    last = max(depth.values(), default=0) or int(bool(of_rows))
    soon = {name: n for name, n in of_units.items() if name in early.union(unread) and not n.is_constant()}

    # what a phase gives that is not the same for all units, and what it can read from an earlier one
    roots = [[n.args[0] for n in (*means, *of_heads) if depth[n] == k + 1] for k in range(last + 1)]
    for n in operands.values():
        roots[depth[n]].append(n)
    roots[last] += [n for name, n in of_units.items() if name not in soon]
    for n in soon.values():
        roots[depth[n]].append(n)
    there = {*leaves, *row_values, *of_heads, *product_results.values()}
    stored = {n: name for name, n in soon.items() if name in early}
    until: dict[Node, int] = {}  # the last phase that reads a value which is kept
    for k in range(last, 0, -1):
        inside = in_order(roots[k], there)
        before = [n for n in inside if depth[n] < k and not n.is_constant()]
        needed = {n for n in roots[k] if depth[n] < k}
        needed |= {a for n in inside if depth[n] == k and n not in there for a in n.args}
        near = {*leaves, *stored, *until, *product_results.values()}
        load = {n: 1.0 if n in near else KEEP for n in before}
        load |= {n: 0.0 for n in before if n in row_values} | {n: inf for n in before if n.op in COMPARISONS}
        compute = {n: inf if n in there else Costs().of(n) for n in before}
        for n in cut(before, needed.intersection(before), load, compute)[1]:
            if n not in there and n not in stored and n not in until:
                until[n] = k
                roots[depth[n]].append(n)
    kept, ends = dict[Node, str](), list[int]()  # a value takes the place of one that no later phase reads
    for n in sorted(until, key=lambda n: (depth[n], n.number)):
        place = next((j for j, end in enumerate(ends) if end <= depth[n]), len(ends))
        ends[place : place + 1] = [until[n]]
        kept[n] = f"{mark}kept{place}"

    def function_of(name: str, from_: Mapping[str, Node], to: Mapping[str, Node]) -> Function:
        used = set(in_order(to.values(), from_.values()))
        return Function(name, {key: n for key, n in from_.items() if n in used}, dict(to))

    def known_in(k: int, values: Mapping[str, Node]) -> dict[str, Node]:
        return {name: n for name, n in values.items() if depth[n] == k}

    phases, of_earlier = list[Phase](), dict[str, Node]()
    for k in range(last + 1):
        now = known_in(k, of_rows)
        of_row = {name: n for name, n in arguments.items() if name in rows} | of_earlier | known_in(k, sums)
        row_results = {name: n for name, n in wanted.items() if name in rows}
        known = {name: n for name, n in arguments.items() if name not in rows} | of_earlier | now
        known |= {name: n for n, name in stored.items() if depth[n] < k}
        known |= {name: n for n, name in kept.items() if depth[n] < k <= until[n]}
        known |= {name: n for name, n in (head_means | product_results).items() if depth[n] <= k}
        to = known_in(k, operands) | {name: n.args[0] for name, n in (sums | head_means).items() if depth[n] == k + 1}
        to |= {name: n for n, name in kept.items() if depth[n] == k} | known_in(k, soon)
        to |= {name: n for name, n in of_units.items() if k == last and name not in soon}
        means_at = tuple(len(ends) + j for j, n in enumerate(of_heads) if depth[n] == k)
        row_function = function_of("rows", of_row, now | known_in(k, row_results))
        groups_now = tuple(group for group in range(len(groups)) if depth_of_group.get(group) == k)
        phases.append(Phase(row_function, function_of("units", known, to), means_at, groups_now))
        of_earlier |= now
    operand_names = tuple(f"{mark}operand{k}" for k in range(len(groups)))
    product_names = tuple(f"{mark}product{k}" for k in range(len(all_products) if operands else len(groups)))
    kept_names = *dict.fromkeys(kept.values()), *head_means
    return Phases((*phases,), (*of_rows,), (*sums,), kept_names, operand_names, product_names)
