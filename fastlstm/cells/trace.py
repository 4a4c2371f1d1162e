"""A cell's function run once on the nodes of a graph, with errors that name its line."""

import inspect
import linecache
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, TracebackType
from typing import Any

from fastlstm.cells.functions import ALLOWED, FUNCTIONS
from fastlstm.cells.graph import Graph, Node


class Trace:
    """What the function of the cell `name` computes: its inputs by their names in what is derived, and its new states
    by theirs.

    Args:
        names: for each argument that the function may take its name in what is derived.
        states: what the results are called.
        free: the names of the inputs that are there anyway: the cell's params and inputs.

    Raises:
        TypeError: the function does anything but arithmetic, or returns other than one value a state.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        names: Mapping[str, str],
        states: Sequence[str],
        free: Sequence[str],
    ) -> None:
        graph = self.graph = Graph()
        nodes = {argument: graph.input(label) for argument, label in names.items()}
        local: dict[str, Any] = {}
        result = _run(name, function, {taken: nodes[taken] for taken in inspect.signature(function).parameters}, local)
        found = list(result) if isinstance(result, tuple | list) else [result]
        if len(found) != len(states):
            raise TypeError(
                f"cell {name} must return {len(states)} value{'s' * (len(states) > 1)}, the new {', '.join(states)}, "
                f"got {len(found)}"
            )
        for state, value in zip(states, found):
            if not isinstance(value, Node):
                raise TypeError(
                    f"cell {name} must return a value for {state} that depends on its arguments, got {value!r}"
                )
            if value.op in ("greater", "at_least", "constant"):
                raise TypeError(f"cell {name} must return a value for {state}, got a comparison or a constant")
        for state, value in zip(states, found):
            value.hint = value.hint or (state if value.args else None)
        for variable, value in local.items():
            if isinstance(value, Node) and value.args and value.hint is None:
                value.hint = variable
        self.inputs = {names[argument]: node for argument, node in nodes.items()}
        self.results, self.free = dict(zip(states, found)), tuple(free)


def _run(name: str, function: Callable[..., Any], arguments: dict[str, Node], local: dict[str, Any]) -> Any:
    """The function's result; its local variables at the end go into `local`, so that values keep their names."""
    code = function.__code__

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is code:
            local.update(frame.f_locals)

    before: Any = sys.getprofile()
    sys.setprofile(watch)
    try:
        return function(**arguments)
    except Exception as error:
        what = str(error).replace("'Node'", "a value of a cell").replace("Node", "a value of a cell")
        place = _place(code, error.__traceback__)
        raise TypeError(f"cell {name}, {place}: {what}{_instead(what)}. Allowed: {ALLOWED}") from error
    finally:
        sys.setprofile(None)
        if callable(before):
            sys.setprofile(before)
        elif before is not None:  # cProfile's, which is no function
            before.enable()


def _instead(what: str) -> str:
    """What to write in place of a method or of torch's function, if fastlstm.cells has one of its name."""
    found = re.match(r"a value has no \.(\w+)|(\w+)\(\)", what)
    name = found and (found[1] or found[2])
    return f"; write {name} of fastlstm.cells" if name in FUNCTIONS else ""


def _place(code: CodeType, traceback: TracebackType | None) -> str:
    """The line of the cell's function that an error came from."""
    line = code.co_firstlineno
    while traceback is not None:
        if traceback.tb_frame.f_code is code:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    source = linecache.getline(code.co_filename, line).strip()
    return f"line {line} `{source}`" if source else f"line {line}"
