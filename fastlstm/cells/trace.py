"""A cell's function run once on the nodes of a graph, with errors that name its line."""

import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, FrameType, TracebackType
from typing import Any

from fastlstm.cells.functions import ALLOWED, FUNCTIONS
from fastlstm.cells.graph import COMPARISONS, HEADS, Graph, NoAttribute, Node, in_order
from fastlstm.cells.hints import did_you_mean, instead


class Product:
    """The product of a weight (H, H) with a value, which the author of a cell calls as a function."""

    def __init__(self, weight: Node) -> None:
        self.weight, self.is_used = weight, False

    def __call__(self, *values: Any) -> Node:
        name = self.weight.value
        if len(values) != 1:
            raise TypeError(f"{name} multiplies one value, got {len(values)}: declare a product for each value")
        value = values[0]
        if not isinstance(value, Node) or value.per_row or value.op in COMPARISONS:
            given = repr(value) if isinstance(value, Node | Product) else type(value).__name__
            shared = ", which all units share" * (isinstance(value, Node) and value.per_row)
            raise TypeError(f"{name} multiplies a value of each unit, got {given}{shared}")
        if self.is_used:
            share = f"rnn.weight_other_l0 = rnn.weight_{name}_l0"
            raise TypeError(
                f"{name} is used twice: declare a product for each value, and to share their weight {share}"
            )
        self.is_used = True
        return value.graph.make("product", value, self.weight)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a product has no .{name}: call it, as w(a), and for a bias take one of params")

    def __repr__(self) -> str:
        return f"<the product {self.weight.value} of a cell>"


class Trace:
    """What the function of the cell `name` computes: its inputs by their names in what is derived, and its new states
    by theirs.

    Args:
        names: for each argument that the function may take its name in what is derived.
        states: what the results are called.
        free: the names of the inputs that are there anyway: the cell's params, inputs and weights of products. The
            number of heads joins them if a mean is of a head.
        products: the names of the products, which the function gets as functions.

    Raises:
        TypeError: the function does anything but arithmetic, or returns other than one value a state, or no new state
            depends on an argument that is no state.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        names: Mapping[str, str],
        states: Sequence[str],
        free: Sequence[str],
        products: Sequence[str] = (),
    ) -> None:
        graph = self.graph = Graph()
        nodes = {argument: graph.input(label) for argument, label in names.items()}
        local: dict[str, Any] = {}
        given: dict[str, Node | Product] = nodes | {product: Product(nodes[product]) for product in products}
        result = _run(name, function, {taken: given[taken] for taken in inspect.signature(function).parameters}, local)
        values = list(result) if isinstance(result, tuple | list) else [result]
        if len(values) != len(states):
            raise TypeError(
                f"cell {name} must return {len(states)} value{'s' * (len(states) > 1)}, the new {', '.join(states)}, "
                f"got {len(values)}"
            )
        for state, value in zip(states, values):
            if not isinstance(value, Node):
                raise TypeError(
                    f"cell {name} must return a value for {state} that depends on its arguments, got {value!r}"
                )
            if value.op in ("greater", "at_least", "constant"):
                raise TypeError(f"cell {name} must return a value for {state}, got a comparison or a constant")
        for state, value in zip(states, values):
            value.hint = value.hint or (state if value.args else None)
        for variable, value in local.items():
            if isinstance(value, Node) and value.args and value.hint is None:
                value.hint = variable
        self.inputs = {names[argument]: node for argument, node in nodes.items()}
        self.results, self.free = dict(zip(states, values)), tuple(free)
        used = set(in_order(values))
        if unused := [each for each, node in nodes.items() if each not in states and node not in used]:
            raise TypeError(f"cell {name}: no new state depends on {unused[0]}; leave it out")
        if any(node.op == "mean_of_head" for node in used):
            self.inputs[HEADS], self.free = graph.input(HEADS), (*self.free, HEADS)


def _run(
    name: str, function: Callable[..., Any], arguments: Mapping[str, Node | Product], local: dict[str, Any]
) -> Any:
    """Return the function's result, and put its last local variables into `local`, so that values keep their names."""
    code = function.__code__
    failed: tuple[Any, str | None] = None, None  # the place and the name of the last call of a C function that raised

    def watch(frame: Any, event: str, called: Any) -> None:
        nonlocal failed
        if event == "return" and frame.f_code is code:
            local.update(frame.f_locals)
        elif event == "c_exception":
            failed = (frame, frame.f_lineno), getattr(called, "__name__", None)

    before: Any = sys.getprofile()
    sys.setprofile(watch)
    try:
        return function(**arguments)
    except Exception as error:
        what = _described(error, failed, arguments)
        raise TypeError(f"cell {name}, {_place(code, error.__traceback__)}: {what}. Allowed: {ALLOWED}") from error
    finally:
        sys.setprofile(None)
        if callable(before):
            sys.setprofile(before)
        elif before is not None:  # cProfile's, which is no function
            before.enable()


def _described(error: Exception, failed: tuple[Any, str | None], arguments: Iterable[str]) -> str:
    """Say what went wrong, without the name of a class that authors have never met. `failed`: the frame and line that
    last called a C function which raised, and the function's name. `arguments`: of the cell's function.
    """
    places = [*traceback.walk_tb(error.__traceback__)]
    kinds = NameError, AttributeError, NoAttribute
    unknown = next((each.name for each in (error, error.__cause__) if isinstance(each, kinds)), None)
    of_torch = [frame.f_code.co_name for frame, _ in places if _is_torchs(frame)]
    for name in (*of_torch, unknown, failed[1] if failed[0] in places else None):
        if text := instead(name):
            return text
    text = str(error).replace("'Product'", "a product, which takes a value: w(a),")
    text = text.replace("'Node'", "a value of a cell").replace("Node", "a value of a cell")
    return text + (did_you_mean(unknown, [*FUNCTIONS, *arguments]) if unknown else "")


def _is_torchs(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("torch.")


def _place(code: CodeType, raised: TracebackType | None) -> str:
    """Return the line of the cell's function that an error came from."""
    line = code.co_firstlineno
    for frame, number in traceback.walk_tb(raised):
        line = number if frame.f_code is code else line
    source = linecache.getline(code.co_filename, line).strip()
    return f"line {line} `{source}`" if source else f"line {line}"
