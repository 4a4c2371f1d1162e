"""What the author of a cell writes: its gates, its states and a function of a few lines."""

import functools
import hashlib
import inspect
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastlstm.cells.derive import Derived
from fastlstm.cells.emit import RESERVED, python
from fastlstm.cells.graph import DECLARE_PRODUCT, in_order
from fastlstm.cells.hints import checked_by, did_you_mean
from fastlstm.cells.layout import Layout
from fastlstm.cells.on_tensors import ON_TENSORS
from fastlstm.cells.saving import Costs
from fastlstm.cells.trace import Trace
from fastlstm.forks import cached_property, waited_for

LIBRARY = tuple(f"fastlstm.cells.{name}" for name in ("library", "neurons", "normalized"))
Params = Sequence[str] | Mapping[str, float | None]


class Cell:
    """A recurrent cell, as `cell` declares it. Called, it is the author's function: on tensors or on numbers, with a
    function of a value for each product.

    Cells are equal if they are the same object. A cell pickles by reference to the name of a module that it was defined
    under, as a function does.

    Attributes:
        name: the function's name.
        gates: for each pre-activation which products it sums, "x", "h" or "xh".
        states: the names of the states, of which the first is the output and what the h products multiply.
        params: the names of vectors (H,).
        initial: the numbers that params start from, by name. Modules draw all other params at random.
        inputs: the names of values (T, B, H), which are one more elementwise value a step. In a module of several
            layers every layer gets the same values: ``inputs=("x",)`` is the module's x in each, and not what the layer
            before returns.
        products: the names of products with values that the step computes, each with a weight (H, H).
        gates_of_x: how many gates sum "x", alone or in "xh".
        gates_of_h: how many gates sum "h", alone or in "xh".
        states_read: the states whose values before the step the arithmetic reads, as an LSTM's reads c, but not h.
        has_projection: whether the first state is the result of the only product, which may then have fewer units.
        key: a word by which `by_key` finds the cell. A cell of the library has its name. Other cells have their
            module's name before it, and after it a digest of all that they compute: what each gate sums, the order of
            gates, states, params, inputs and products, and the arithmetic. If that is taken, a number follows.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        gates: Mapping[str, str],
        states: Sequence[str],
        params: Params,
        inputs: Sequence[str],
        products: Sequence[str] = (),
    ) -> None:
        if not inspect.isfunction(function):
            raise TypeError(f"a cell is declared by a Python function, got {function!r}")
        if not isinstance(gates, Mapping):
            raise TypeError(f'cell {function.__name__}: gates must map names to "x", "h" or "xh", got {gates!r}')
        for kind, names in (("states", states), ("params", params), ("inputs", inputs), ("products", products)):
            may_map = kind == "params"
            if isinstance(names, str) or not isinstance(names, (Sequence, Mapping) if may_map else Sequence):
                wanted = f"a sequence of names{' or a mapping from them' * may_map}, since their order counts"
                raise TypeError(f"cell {function.__name__}: {kind} must be {wanted}, got {names!r}")
        functools.update_wrapper(self, function)
        self.name, self.function, self.gates = function.__name__, function, dict(gates)
        self.states, self.params, self.inputs = tuple(states), tuple(params), tuple(inputs)
        self.products = tuple(products)
        starts: Mapping[str, Any] = params if isinstance(params, Mapping) else {}
        self.initial: dict[str, float] = {name: start for name, start in starts.items() if start is not None}
        _check(self)
        self.gates_of_x, self.gates_of_h = (sum(operand in sums for sums in self.gates.values()) for operand in "xh")
        # once: numbers that the function takes from elsewhere are those of its declaration
        free = *self.params, *self.inputs, *self.products
        self._traced = Trace(self.name, function, self.arguments, self.states, free, self.products)
        used = set(in_order(self._traced.results.values()))
        self.states_read = tuple(state for state in self.states if self._traced.inputs[f"{state}_prev"] in used)
        # Whether h is a product that nothing else reads, nor the h of the step before. A product's weight may then have
        # fewer rows than there are units.
        h = self._traced.results[self.states[0]]
        self.has_projection = (
            len(self.products) == 1
            and h.op == "product"
            and self.states[0] not in self.states_read
            and sum(arg is h for node in used for arg in node.args) == 0
            and sum(result is h for result in self._traced.results.values()) == 1
        )
        with _declaring:
            self.key = _register(self)
            for listener in when_declared:
                listener(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        kinds = "params", "inputs", "products"
        others = "".join([f", {kind} {getattr(self, kind)}" for kind in kinds if getattr(self, kind)])
        return f"<cell {self.name}: gates {self.gates}, states {self.states}{others}>"

    def __reduce__(self) -> str:
        return str(self.__qualname__)  # type: ignore[attr-defined]  # update_wrapper sets it

    @property
    def arguments(self) -> dict[str, str]:
        """The arguments of a step: each name of the author's function, and its name in the derived functions."""
        return {
            **{gate: f"{gate}_pre" for gate in self.gates},
            **{state: f"{state}_prev" for state in self.states},
            **{name: name for name in (*self.params, *self.inputs, *self.products)},
        }

    def derived(self, costs: Costs | None = None) -> Derived:
        """Return all that follows from the arithmetic; it prints both passes. `costs` decide what is saved."""
        derived = self._derived  # first, so that its text does not depend on what else has been derived
        if costs is None:
            return derived
        with _declaring:
            return Derived(self.name, self._traced, costs)

    @cached_property
    def layout(self) -> Layout:
        """What a kernel has to know beside the functions."""
        return Layout(self._derived, self.gates, self.states, self.params, self.inputs)

    @cached_property
    def _derived(self) -> Derived:
        with _declaring:  # since Python 3.12 threads may be here at once, and deriving adds to the one graph
            return vars(self).get("_derived") or Derived(self.name, self._traced, Costs())


def _check_keywords(*function: Any, **_: Any) -> None:
    if function:
        raise TypeError("cell takes no function: write @cell(gates=..., states=...) above it, with parentheses")


@checked_by(_check_keywords)
def cell(
    *,
    gates: Mapping[str, str],
    states: Sequence[str],
    params: Params = (),
    inputs: Sequence[str] = (),
    products: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Cell]:
    """Declare a recurrent cell by the arithmetic of one step:

        @cell(gates={"r": "xh", "z": "xh", "n_x": "x", "n_h": "h"}, states=("h",))
        def gru(r, z, n_x, n_h, h):
            r, z = sigmoid(r), sigmoid(z)
            n = tanh(n_x + r * n_h)
            return n + z * (h - n)

    The function takes any of the names declared: a gate's is its pre-activation, a state's the state before the step,
    and a product's a function. It returns the new states in their order. It may use ``+ - * /``, powers, comparisons,
    numbers and the functions of `fastlstm.cells`. All of it is elementwise but products, `mean` and the norms, which
    see the units of a row or of a head. The derivatives follow from it.

    Args:
        gates: for each pre-activation which products it sums: "x" with weight_ih, "h" with weight_hh, "xh" both.
        states: names. The first state is the output, and what h products multiply.
        params: names of vectors (H,), such as peepholes. A mapping says by name what number all elements of one start
            from: ``{"scale": 1.0}``. None, as a sequence of names alone, leaves it to be drawn as weights are.
        inputs: names of values (T, B, H), one more elementwise value a step, such as a mask or a time gap.
        products: names of products with values that the step itself computes. The function calls each of them once,
            with a value of each unit: ``n_h(r * h)`` is weight_n_h (H, H) times this value, without a bias. Products of
            equal values cost one.

    Raises:
        TypeError: the function takes an argument that is not declared, returns other than one value a state, or does
            anything but such arithmetic, where the message names the line; no new state depends on a gate, param, input
            or product; a param starts from anything but a number.
        ValueError: a gate sums anything else, or a name is used twice or cannot be one.
    """
    return functools.partial(Cell, gates=gates, states=states, params=params, inputs=inputs, products=products)


when_declared: list[Callable[[Cell], Any]] = []  # called with each cell that is declared from then on
_cells: dict[str, Cell] = {}
_declaring = waited_for(threading.RLock())


def by_key(key: str) -> Cell:
    """Return the cell of this key. Raise LookupError if no such cell has been declared in this process."""
    cell = _cells.get(key)
    if cell is None:
        raise LookupError(f"no cell {key} has been declared: import the module that declares it, unchanged")
    return cell


def _register(cell: Cell) -> str:
    module, name = cell.function.__module__, cell.function.__qualname__
    if module in LIBRARY:
        base = name
    else:  # caches of compilers, and exports, must not take a cell for an edited one
        functions = [python(function) for function in (cell.derived().forward, cell.derived().backward)]
        declared = repr((list(cell.gates.items()), cell.states, cell.params, cell.inputs, *cell.products))
        digest = hashlib.sha256("".join([declared, *functions]).encode()).hexdigest()[:8]
        word = re.sub(r"\W", "_", f"{module}_{name}", flags=re.ASCII).lstrip("_")  # Python mangles a leading __
        base = f"{word}_{digest}"
    key, number = base, 1
    while key in _cells:
        number += 1
        key = f"{base}_{number}"
    _cells[key] = cell
    return key


def _check(cell: Cell) -> None:
    """Raise unless names and gates are such as can be derived from."""
    if not cell.states:
        raise ValueError(f"cell {cell.name} must have a state: the first is its output")
    for kind in ("gates", "states", "params", "inputs", "products"):
        for name in getattr(cell, kind):
            if not isinstance(name, str):
                raise TypeError(f"cell {cell.name}: {kind} must be names, got {name!r}")
    wrong = next((gate for gate, sums in cell.gates.items() if sums not in ("x", "h", "xh")), None)
    if wrong is not None:
        instead = f": for what the step computes {DECLARE_PRODUCT}" * isinstance(cell.gates[wrong], str)
        wanted = f'gate {wrong} must sum "x", "h" or "xh"'
        raise ValueError(f"cell {cell.name}: {wanted}, got {cell.gates[wrong]!r}{instead}")
    start: Any
    for name, start in cell.initial.items():
        if isinstance(start, bool) or not isinstance(start, int | float) or not math.isfinite(start):
            raise TypeError(f"cell {cell.name}: param {name} must start from a finite number or None, got {start!r}")
    declared = (*cell.gates, *cell.states, *cell.params, *cell.inputs, *cell.products)
    odd = next((n for n in declared if not (n.isidentifier() and n.isascii()) or n in ON_TENSORS), None)
    if odd is not None:
        raise ValueError(f"cell {cell.name}: {odd!r} must be a name of ASCII characters, and not a function's")
    labels = [*cell.arguments.values(), *cell.states, *(f"{name}_operand" for name in cell.products)]
    labels += [f"d{name}" for name in labels]  # derived functions have gradients d...
    twice = next((name for k, name in enumerate(declared) if name in declared[:k]), None) or next(
        (name for k, name in enumerate(labels) if name in labels[:k] or name in RESERVED), None
    )
    if twice is not None:
        taken = f"the name {twice} is used twice or reserved"
        raise ValueError(f"cell {cell.name}: {taken}; rename a gate, state, param, input or product")
    for argument in inspect.signature(cell.function).parameters.values():
        if argument.default is not argument.empty:
            raise TypeError(f"cell {cell.name} takes {argument}, but no argument may have a default")
        if argument.name not in declared or argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            of_x = ": the gates have the products with x, and x itself may be one of inputs" * (argument.name == "x")
            raise TypeError(
                f"cell {cell.name} takes {argument}, which is no gate, state, param, input or product"
                f"{of_x or did_you_mean(argument.name, declared)}; declared are {', '.join(declared)}"
            )
