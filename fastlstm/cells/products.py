"""Products that share factors multiply these once.

Differentiation leaves products like ``d * g * i * (1 - i)`` and ``d * i * (1 - g * g)``. As multisets of factors they
have pairs in common; the commonest is multiplied first, and stands for one factor from then on.
"""

from collections import Counter

from fastlstm.cells.graph import Graph, Node, in_order


def share_factors(graph: Graph, results: list[Node], leaves: list[Node]) -> list[Node]:
    """The same results with shared factors multiplied once; `leaves` are given."""
    stop, wanted = set(leaves), set(results)
    nodes = in_order(results, stop)
    inner = {n for n in nodes if n.op == "mul" and n not in stop}
    whole = {n for n in inner if n in wanted}  # products that are more than a factor of another product
    for node in nodes:
        if node not in inner and node not in stop:
            whole |= {a for a in node.args if a in inner}

    def factors(node: Node) -> list[Node]:
        return [f for arg in node.args for f in (factors(arg) if arg in inner else [arg])]

    products = {n: factors(n) for n in nodes if n in whole}
    pairs: dict[Node, tuple[Node, Node]] = {}  # a stand-in for each pair multiplied first
    while True:
        counts: Counter[tuple[Node, Node]] = Counter()
        for product in products.values():
            counts.update(_pairs(product))
        pair = max(counts, key=lambda p: (counts[p], -p[0].number - p[1].number), default=None)
        if pair is None or counts[pair] < 2:
            break
        stand_in = graph.input(f"pair {pair[0].number} {pair[1].number}")
        pairs[stand_in] = pair
        for product in products.values():
            while (at := _find(product, pair)) is not None:
                product[at[0]] = stand_in
                del product[at[1]]

    made: dict[Node, Node] = {}

    def rebuilt(node: Node) -> Node:
        if node not in made:
            if node in pairs:
                result = rebuilt(pairs[node][0]) * rebuilt(pairs[node][1])
            elif node in stop or not node.args:
                result = node
            elif node in products:
                first, *others = map(rebuilt, products[node])
                result = first
                for other in others:
                    result = result * other
            else:
                result = graph.make(node.op, *map(rebuilt, node.args))
            result.hint = result.hint or node.hint
            made[node] = result
        return made[node]

    return [rebuilt(r) for r in results]


def _pairs(product: list[Node]) -> Counter[tuple[Node, Node]]:
    """Each pair of factors, as often as it can be taken out."""
    number, found = Counter(product), Counter[tuple[Node, Node]]()
    distinct = sorted(number, key=lambda n: n.number)
    for k, a in enumerate(distinct):
        if number[a] > 1:
            found[a, a] = number[a] // 2
        for b in distinct[k + 1 :]:
            found[a, b] = min(number[a], number[b])
    return found


def _find(product: list[Node], pair: tuple[Node, Node]) -> tuple[int, int] | None:
    """Where two factors of a product are, in order, or None."""
    places = [[k for k, factor in enumerate(product) if factor is wanted] for wanted in pair]
    if pair[0] is pair[1]:
        return (places[0][0], places[0][1]) if len(places[0]) > 1 else None
    return (min(places[0][0], places[1][0]), max(places[0][0], places[1][0])) if all(places) else None
