"""A cell's forward and backward from its trace.

All operations but means and products are elementwise, so a derivative is a factor. The mean over the units of a row or
of a head is linear and its own adjoint: a gradient goes through it as its mean.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastlstm.cells.emit import RESERVED, Function, python
from fastlstm.cells.functions import mean, sigmoid, where
from fastlstm.cells.graph import MEANS, Node, in_order
from fastlstm.cells.saving import Costs, choose_saved
from fastlstm.cells.trace import Trace

LONGEST = 20  # characters of a name that is made of operations
Partial = Callable[..., Node]


def _of_greater(t: Node, a: Node, b: Node) -> Any:
    return where(b >= a, where(b > a, 0.0, 0.5 * t), t)


# For each argument: t times the derivative of y = op(*args) by it. Written with y where that is enough, since y is what
# the backward pass has. As in torch, a NaN lets t through, and at a tie each argument of maximum gets half.
PARTIALS: dict[str, tuple[Partial | None, ...]] = {
    "add": (lambda t, y, a, b: t, lambda t, y, a, b: t),
    "sub": (lambda t, y, a, b: t, lambda t, y, a, b: -t),
    "mul": (lambda t, y, a, b: t * b, lambda t, y, a, b: t * a),
    "div": (lambda t, y, a, b: t / b, lambda t, y, a, b: -(t / b * y)),
    "neg": (lambda t, y, a: -t,),
    "sigmoid": (lambda t, y, a: t * y * (1.0 - y),),
    "tanh": (lambda t, y, a: t * (1.0 - y * y),),
    "relu": (lambda t, y, a: where(y <= 0.0, 0.0, t),),
    "exp": (lambda t, y, a: t * y,),
    "mean": (lambda t, y, a: mean(t),),
    "mean_of_head": (lambda t, y, a, heads: mean(t, "head"), None),
    # the gradient of a weight counts as that of the product: what is multiplied with it is saved, see `Derived`
    "product": (None, lambda t, y, a, weight: t),
    "sqrt": (lambda t, y, a: t * (0.5 / y),),
    "rsqrt": (lambda t, y, a: t * (-0.5 * (y * y * y)),),
    "log": (lambda t, y, a: t / a,),
    "log_sigmoid": (lambda t, y, a: t * sigmoid(-a),),
    "maximum": (lambda t, y, a, b: _of_greater(t, a, b), lambda t, y, a, b: _of_greater(t, b, a)),
    "where": (None, lambda t, y, c, a, b: where(c, t, 0.0), lambda t, y, c, a, b: where(c, 0.0, t)),
}


def propagate_gradients(gradients: Mapping[Node, Node], inputs: Iterable[Node]) -> list[Node]:
    """Return the gradients of `inputs`, from those of results. Inputs count as independent of each other."""
    inputs, back = list(inputs), dict(gradients)
    leaves = set(inputs)
    of_products: dict[Node, list[tuple[Node, Node]]] = {}  # gradients and weights of all products of a value
    for node in reversed(in_order(gradients, leaves)):  # each node after all that depend on it
        if node in of_products:
            in_order_of_weights = sorted(of_products[node], key=lambda pair: pair[1].number)
            part = node.graph.make("transposed_product", *itertools.chain(*in_order_of_weights))
            back[node] = back[node] + part if node in back else part
        if node.op == "product" and node in back and node not in leaves:
            of_products.setdefault(node.args[0], []).append((back[node], node.args[1]))
        parts: dict[Node, Node] = {}  # both arguments of a square are the same node
        for arg, partial in zip(node.args, PARTIALS.get(node.op, ())):
            if partial is not None and node in back and node not in leaves and not arg.is_constant():
                part = partial(back[node], node, *node.args)
                parts[arg] = parts[arg] + part if arg in parts else part
        for arg, part in parts.items():
            back[arg] = back[arg] + part if arg in back else part
    return [back.get(a, a.graph.constant(0)) for a in inputs]


class Derived:
    """What follows from a cell's arithmetic.

    A gate's pre-activation is called ``i_pre``, a state ``c`` after the step and ``c_prev`` before it, their gradients
    ``dc`` and ``dc_prev``. A function takes only the arguments that it depends on, and returns no gradient that is
    always zero.

    Attributes:
        name: the cell's.
        forward: the new states and the saved values.
        backward: the gradients of all arguments of forward, from those of the new states.
        means: the operations of the means over units that forward takes.
        saved: the values that forward saves, beside the states of all steps that backward reads.
        saved_rows: those of `saved` that are the same for all units of a row.
        multiplied: for each product the name of the saved value that it multiplies. A weight's gradient is the sum of
            outer products of this value with what backward returns for the weight, such as ``dn_h``.
        states_read: the states of all steps that backward reads.

    Args:
        costs: as in `Cell.derived`.
    """

    def __init__(self, name: str, trace: Trace, costs: Costs) -> None:
        inputs, new = trace.inputs, trace.results
        old = {state: inputs[f"{state}_prev"] for state in new}
        d_new = {f"d{state}": trace.graph.input(f"d{state}") for state in new}

        incoming: dict[Node, Node] = {}
        for node, gradient in zip(new.values(), d_new.values()):
            incoming[node] = incoming[node] + gradient if node in incoming else gradient
        gradients = dict(zip((f"d{name}" for name in inputs), propagate_gradients(incoming, inputs.values())))
        products = [n for n in in_order(new.values()) if n.op == "product"]
        operands = {n.args[1].value: n.args[0] for n in sorted(products, key=lambda n: n.args[1].number)}

        free = {name: inputs[name] for name in trace.free}
        multiplied = {n: f"{name}_operand" for name, n in reversed(operands.items())}  # several products of one value
        loaded, sequences = choose_saved(
            gradients.values(), inputs.values(), d_new.values(), new, old, free.values(), costs, multiplied
        )
        of_states = {f"{state}_prev": old[state] for state in sequences} | {state: new[state] for state in sequences}
        read = set(loaded)
        of_states = {name: n for name, n in of_states.items() if n in read and not n.per_row and n not in multiplied}
        known = {*of_states.values(), *free.values(), *multiplied}
        saved = {name: node for node, name in sorted(multiplied.items(), key=lambda item: item[0].number)}
        saved |= _named((node for node in loaded if node not in known), {*inputs, *new, *d_new, *saved})

        def function(name: str, arguments: Mapping[str, Node], results: Mapping[str, Node]) -> Function:
            results = {name: node for name, node in results.items() if not node.is_constant(0)}
            used = set(in_order(results.values(), arguments.values()))
            return Function(name, {name: node for name, node in arguments.items() if node in used}, results)

        self.name, self.saved, self.states_read = name, tuple(saved), tuple(of_states)
        self.multiplied = {name: multiplied[n] for name, n in operands.items()}
        self.saved_rows = tuple(name for name, node in saved.items() if node.per_row)
        self.means = {node.op for node in in_order(new.values()) if node.op in MEANS}
        self.forward = function("forward", inputs, {**new, **saved})
        self.backward = function("backward", {**d_new, **saved, **of_states, **free}, gradients)

    def __str__(self) -> str:
        """Return the text of forward and backward, the saved values, and the numbers of operations."""
        of_units = len(self.saved) - len(self.saved_rows) + len(self.states_read)
        of_rows = f", {len(self.saved_rows)} for each row and step" if self.saved_rows else ""
        return "\n".join([
            f"cell {self.name}\n",
            _described(self.forward),
            _described(self.backward),
            f"saved by forward: {' '.join(self.saved) or 'nothing'}",
            f"states read by backward: {' '.join(self.states_read) or 'none'}",
            f"so backward reads {of_units} values for each unit and step{of_rows}, beside gradients",
        ])  # fmt: skip


def _described(function: Function) -> str:
    counts = ", ".join(f"{number} {op}" for op, number in function.operations().items())
    return f"{function.name}: {function.count} operations ({counts})\n{python(function)}"


def _named(nodes: Iterable[Node], taken: set[str]) -> dict[str, Node]:
    """Return nodes by unique names: those that the author gave them, or names of their operations."""

    def name(node: Node) -> str:
        if node.hint or node.op == "input":
            return node.hint or str(node.value)
        if node.args:
            return "_".join([node.op, *map(name, node.args)])
        return f"{node.value:g}".replace(".", "_").replace("-", "minus_").replace("+", "")

    labelled: dict[str, Node] = {}
    for node in nodes:
        stem = name(node)
        stem = stem if len(stem) <= LONGEST else node.op  # what it is alone
        others = {*labelled, *taken, *RESERVED} if node.args else {*labelled}
        labels = itertools.chain([stem], (f"{stem}_{k}" for k in itertools.count(1)))
        labelled[next(label for label in labels if label not in others)] = node
    return labelled
