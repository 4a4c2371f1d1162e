"""What the forward pass saves for the backward pass: the cheapest choice, as a minimum cut. A value can be loaded if it
was saved, be a state of the step before or after, which may be kept anyway, or be computed again from others.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf

from fastlstm.cells.graph import ACROSS, COMPARISONS, Node, in_order


@dataclass(frozen=True)
class Costs:
    """What an operation costs, in additions of two elements. Saving and loading costs more than any function; states
    are written anyway, and cost less. A value that all units of a row share costs next to nothing.
    """

    save: float = 40.0
    keep: float = 30.0
    load: float = 4.0
    of_row: float = 2.0
    function: float = 12.0
    division: float = 5.0

    def of(self, node: Node) -> float:
        """Return the cost of computing a value from its arguments."""
        if node.per_row:
            return self.of_row / 4
        if node.op in ("sigmoid", "tanh", "exp", "log_sigmoid", "log"):
            return self.function
        divisions = {"div": 1, "sqrt": 1, "rsqrt": 2}.get(node.op)
        return divisions * self.division if divisions else 0.0 if node.op in ("stop_gradient", "fill") else 1.0

    def saving(self, node: Node) -> float:
        """Return the cost of saving a value and loading it."""
        return self.of_row if node.per_row else self.save


def choose_saved(
    results: Iterable[Node],
    inputs: Iterable[Node],
    gradients: Iterable[Node],
    new: Mapping[str, Node],
    old: Mapping[str, Node],
    operands: Iterable[Node],
    costs: Costs,
    multiplied: Iterable[Node] = (),
) -> tuple[list[Node], list[str]]:
    """Return the nodes that the backward pass loads to compute `results`, and the states whose sequences it reads.

    The first state, the output, is there in any case. That of each other is left out, from the last on, if the choice
    without it costs no more.

    Args:
        results: the gradients of `inputs`, from those of the new states, which are `gradients`.
        new, old: each state after the step and before it, by its name.
        operands: the params, inputs and weights, which are in memory anyway.
        multiplied: the values that products multiply, which are saved anyway: weight gradients are made of them.
    """
    nodes, inputs_set, operands, gradient_nodes = in_order(results), set(inputs), set(operands), set(gradients)
    multiplied = set(multiplied)
    for node in nodes:
        if any(a in gradient_nodes for a in node.args):  # arguments come first
            gradient_nodes.add(node)
    needed = [
        a for n in nodes if n in gradient_nodes for a in n.args if a not in gradient_nodes and not a.is_constant()
    ]
    forward_nodes = sorted((n for n in in_order(needed) if not n.is_constant()), key=lambda n: n.number)

    # a mean is never computed again: the backward pass would go over the units once more to add them up
    compute = {n: inf if n in inputs_set or n.op in ACROSS else costs.of(n) for n in forward_nodes}

    def choice(stored: list[str]) -> tuple[float, list[Node], list[str]]:
        """Return the cost with the sequences of `stored`, what is loaded, and which of the sequences are read."""
        near = {states[name] for name in stored for states in (new, old) if not states[name].per_row}
        load = {n: 0.0 if n in operands else costs.load if n in near else costs.saving(n) for n in forward_nodes}
        load |= {n: inf for n in old.values() if n not in near}
        load |= {n: inf for n in forward_nodes if n.op in COMPARISONS}  # which are no numbers
        load |= {n: costs.load for n in forward_nodes if n in multiplied}
        cost, loaded = cut(forward_nodes, set(needed), load, compute)
        there = set(loaded)
        return cost + costs.keep * len(stored), loaded, [s for s in stored if {new[s], old[s]} & near & there]

    stored = [*new]
    best = choice(stored)
    for state in stored[:0:-1]:
        without = [s for s in stored if s != state]
        other = choice(without)
        if other[0] <= best[0]:
            best, stored = other, without
    return best[1:]


def cut(
    nodes: list[Node], needed: set[Node], load: dict[Node, float], compute: dict[Node, float]
) -> tuple[float, list[Node]]:
    """Return the least cost at which the values `needed` are there, and the nodes that are loaded for it. Each node is
    "there" and "computed" in a network, true on the source's side. A loaded one is there and not computed; a computed
    one costs the edge to the sink, and needs its arguments there.
    """
    capacity: dict[object, dict[object, float]] = {"source": {}, "sink": {}}

    def edge(a: object, b: object, limit: float) -> None:
        capacity.setdefault(a, {})[b] = limit
        capacity.setdefault(b, {}).setdefault(a, 0.0)

    for node in nodes:
        there, computed = (node, "there"), (node, "computed")
        edge(there, computed, load[node])
        edge(computed, "sink", compute[node])
        for arg in node.args:
            if not arg.is_constant():
                edge(computed, (arg, "there"), inf)
        if node in needed:
            edge("source", there, inf)

    total = 0.0
    while True:
        paths: dict[object, list[tuple[object, object]]] = {"source": []}
        queue: deque[object] = deque(paths)
        while queue and "sink" not in paths:
            a = queue.popleft()
            for b, left in capacity[a].items():
                if left > 1e-9 and b not in paths:
                    paths[b] = [*paths[a], (a, b)]
                    queue.append(b)
        if "sink" not in paths:
            return total, [n for n in nodes if (n, "there") in paths and (n, "computed") not in paths]
        flow = min(capacity[a][b] for a, b in paths["sink"])
        for a, b in paths["sink"]:
            capacity[a][b] -= flow
            capacity[b][a] += flow
        total += flow
