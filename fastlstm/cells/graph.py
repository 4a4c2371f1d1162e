"""Straight-line arithmetic, elementwise but for means and products, as a graph in which equal expressions are one node.

A node is what a cell's function is called with when it is traced. Its operators build more nodes, and so do the
functions of `fastlstm.cells.functions`. They fold constants, move signs outwards, and find an expression that is there
already. Nothing is folded that would hide a NaN: ``0 * x`` stays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

Number = float | int
COMPARISONS = ("greater", "at_least")
MEANS = ("mean", "mean_of_head")  # over the units of a row, or of each head
# weight @ value of args (value, weight); the sum of weight.T @ gradient of args (gradient, weight, gradient, weight...)
PRODUCTS = ("product", "transposed_product")
ACROSS = MEANS + PRODUCTS  # what sees other units, and is known one phase after its arguments
HEADS = "heads"  # the input that says how many heads there are: the second argument of `mean_of_head`
DECLARE_PRODUCT = 'declare products=("w",) beside gates, and write w(a)'
MAX_EXPONENT = 16  # a power is written out as a product


def check_no_array(a: Any) -> None:
    """Raise TypeError if an operand of a cell is a tensor or an array."""
    if hasattr(a, "shape") and not isinstance(a, Real):
        own = 'params=("p",) for vectors (H,) or inputs=("p",) for values (T, B, H)'
        got = f"{type(a).__name__} of shape {tuple(a.shape)}"
        raise TypeError(f"got {got}: a cell takes numbers, as a.item(), and what it declares: {own}")


def _operator(op: str, swapped: bool = False) -> Callable[[Node, Node | Number], Node]:
    def method(self: Node, other: Node | Number) -> Node:
        if isinstance(other, Node | Real):
            return self.graph.make(op, *((other, self) if swapped else (self, other)))
        check_no_array(other)
        return NotImplemented  # Python then raises, with both types

    return method


class NoAttribute(TypeError):
    """Raised for `name` after a value and a dot. NumPy takes an AttributeError for leave to go another way."""

    def __init__(self, name: str) -> None:
        super().__init__(f"a value has no .{name}: write functions and operators")
        self.name = name


class Node:
    """``op`` of ``args``. An input has a name as its ``value``, a constant a number. ``number`` counts a graph's nodes
    as they were made, ``hint`` is the author's name of the value, and ``per_row`` says that all units of a row share
    it.
    """

    __slots__ = ("args", "graph", "hint", "number", "op", "per_row", "value")
    __array_priority__ = 1  # NumPy's arrays leave operators to this class, and do not apply them to each element

    def __init__(self, graph: Graph, op: str, args: tuple[Node, ...], value: Any, number: int) -> None:
        self.graph, self.op, self.args, self.value, self.number = graph, op, args, value, number
        self.hint: str | None = None
        shared: bool = op in ("mean", "constant") or (bool(args) and all(a.per_row for a in args))
        self.per_row: bool = shared and op not in COMPARISONS  # which are no numbers

    def is_constant(self, value: Number | None = None) -> bool:
        """Return whether the node is a number, or is this number if there is one."""
        return self.op == "constant" and value in (None, self.value)

    __add__, __radd__ = _operator("add"), _operator("add", swapped=True)
    __sub__, __rsub__ = _operator("sub"), _operator("sub", swapped=True)
    __mul__, __rmul__ = _operator("mul"), _operator("mul", swapped=True)
    __truediv__, __rtruediv__ = _operator("div"), _operator("div", swapped=True)
    __gt__, __lt__ = _operator("greater"), _operator("greater", swapped=True)
    __ge__, __le__ = _operator("at_least"), _operator("at_least", swapped=True)

    def __matmul__(self, other: object) -> Node:
        raise TypeError(f"a cell writes no @: {DECLARE_PRODUCT}")

    __rmatmul__ = __matmul__

    def __call__(self, *args: object) -> Node:
        raise TypeError(f"a value is no function: {DECLARE_PRODUCT}")

    def __neg__(self) -> Node:
        return self.graph.make("neg", self)

    def __pos__(self) -> Node:
        return self

    def __pow__(self, exponent: object) -> Node:
        if not isinstance(exponent, int) or not 1 <= exponent <= MAX_EXPONENT:
            others = "write sqrt(a), rsqrt(a), 1 / a or exp(p * log(a))"
            raise TypeError(f"an exponent must be a whole number from 1 to {MAX_EXPONENT}, got {exponent!r}: {others}")
        product = self
        for _ in range(exponent - 1):
            product = product * self
        return product

    def __rpow__(self, base: object) -> Node:
        check_no_array(base)
        instead = f"write exp(a * log({base!r})) in the place of {base!r} ** a"
        raise TypeError(f"an exponent must be a whole number from 1 to {MAX_EXPONENT}, got a value: {instead}")

    def __abs__(self) -> Node:
        return self.graph.make("maximum", self, -self)

    def __eq__(self, other: object) -> bool:
        raise TypeError("== and != of values have no place in a cell")

    __hash__ = object.__hash__  # by identity, and a set or dict asks for equality only where hashes are equal

    def __bool__(self) -> bool:
        instead = "where(a > b, x, y) for `if` and `and`, and maximum(a, b) for max"
        raise TypeError(f"a value is neither true nor false: write {instead}")

    def __repr__(self) -> str:
        return f"<a value of a cell: {self.op if self.args else self.value}>"

    def __getitem__(self, index: object) -> Node:
        raise TypeError("a value cannot be indexed or looped over: a cell computes the same for each hidden unit")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what Python itself looks for
        raise NoAttribute(name)


class Graph:
    """The nodes that have been made, each expression once."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], Node] = {}

    def input(self, name: str) -> Node:
        return self._node("input", (), name)

    def stand_in(self, node: Node) -> Node:
        """Return the input that stands for a node where it counts as known, whatever it is computed from."""
        if not node.args:
            return node
        stand_in = self._node("input", (), node.number)
        stand_in.per_row = node.per_row
        return stand_in

    def constant(self, value: Number) -> Node:
        if not math.isfinite(value):
            raise ValueError(f"constants must be finite, got {value}")
        return self._node("constant", (), float(value))

    def make(self, op: str, *args: Node | Number) -> Node:
        """Return the node of an operation, or the node that it simplifies to."""
        nodes = tuple(a if isinstance(a, Node) else self.constant(a) for a in args)
        conditions = [a.op in COMPARISONS for a in nodes]
        if any(conditions[op == "where" :]):
            raise TypeError("a comparison has no number: it may be the first argument of where")
        if op == "where" and not conditions[0]:
            raise TypeError("the first argument of where must be a comparison")
        if op == "where" and nodes[1].is_constant() and nodes[2].is_constant():
            like = next(a for a in nodes[0].args if not a.is_constant())  # a number alone has no type
            nodes = nodes[0], self._node("fill", (like, nodes[1]), None), nodes[2]
        if op in COMPARISONS and all(a.is_constant() for a in nodes):
            raise TypeError("a comparison of two constants does not depend on any value")
        if op in FOLDED and all(a.is_constant() for a in nodes):
            return self.constant(FOLDED[op](*[a.value for a in nodes]))
        simpler = SIMPLER[op](*nodes) if op in SIMPLER else None
        return self._node(op, nodes, None) if simpler is None else simpler

    def _node(self, op: str, args: tuple[Node, ...], value: Any) -> Node:
        numbers = tuple(a.number for a in args)
        # a + b is b + a, but keeps the order in which it was written first: that is what a sum of products fuses in
        key = op, tuple(sorted(numbers)) if op in ("add", "mul") else numbers, value
        if key not in self._nodes:
            self._nodes[key] = Node(self, op, args, value, len(self._nodes))
        return self._nodes[key]


def _add(a: Node, b: Node) -> Node | None:
    if a.is_constant(0):
        return b
    if b.is_constant(0):
        return a
    if a is b:
        return 2.0 * a
    if b.op == "neg":
        return a - b.args[0]
    return b - a.args[0] if a.op == "neg" else None


def _sub(a: Node, b: Node) -> Node | None:
    if b.is_constant(0):
        return a
    if a.is_constant(0):
        return -b
    if b.op == "neg":
        return a + b.args[0]
    return -(a.args[0] + b) if a.op == "neg" else None


def _mul(a: Node, b: Node) -> Node | None:
    for one, other in ((a, b), (b, a)):
        if one.is_constant(1):
            return other
        if one.is_constant(-1):
            return -other
        if one.op == "neg":
            return -(one.args[0] * other)
        if one.is_constant() and other.op == "mul" and other.args[0].per_row:
            return (one * other.args[0]) * other.args[1]
    return b * a if b.is_constant() else None  # constants first


def _div(a: Node, b: Node) -> Node | None:
    if b.is_constant(0):
        raise ZeroDivisionError("division by the constant 0")
    if a.is_constant() and b.is_constant():
        return a.graph.constant(a.value / b.value)
    if b.is_constant(1):
        return a
    return -(a.args[0] / b) if a.op == "neg" else None


def _neg(a: Node) -> Node | None:
    if a.op == "sub":
        return a.args[1] - a.args[0]
    return a.args[0] if a.op == "neg" else None


def _where(condition: Node, a: Node, b: Node) -> Node | None:
    return a if a is b else None


def _maximum(a: Node, b: Node) -> Node | None:
    if a is b:
        return a
    return a.graph.make("maximum", b, a) if a.is_constant() else None  # constants last


def _mean(a: Node, *heads: Node) -> Node | None:
    """Move factors and divisors that a row shares out of a mean: they then cost one operation a row, not a unit."""

    def mean(x: Node) -> Node:
        return a.graph.make("mean_of_head" if heads else "mean", x, *heads)

    if a.per_row or (heads and a.op == "mean_of_head"):
        return a
    if a.op == "neg":
        return -mean(a.args[0])
    if a.op == "mul":
        for one, other in (a.args, a.args[::-1]):
            if one.per_row:
                return one * mean(other)
    return mean(a.args[0]) / a.args[1] if a.op == "div" and a.args[1].per_row else None


FOLDED: dict[str, Callable[..., Number]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "maximum": max,
}  # fmt: skip
SIMPLER: dict[str, Callable[..., Node | None]] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "neg": _neg, "where": _where, "maximum": _maximum,
    "mean": _mean, "mean_of_head": _mean,
}  # fmt: skip


def in_order(roots: Iterable[Node], leaves: Iterable[Node] = ()) -> list[Node]:
    """Return all nodes that `roots` are made from, down to `leaves`. Each comes after those that it is made from."""
    order: dict[Node, None] = {}
    stop = set(leaves)
    for root in roots:
        stack = [root]
        while stack:
            node = stack[-1]
            waits = [] if node in stop else [a for a in node.args if a not in order]
            if node in order or not waits:
                order[stack.pop()] = None
            else:
                stack.append(waits[0])
    return list(order)
