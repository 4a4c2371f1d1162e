"""Derived functions as source: Python for tensors, Triton and LLVM vectors alike, and C++ templates.

It has nothing but ``+ - * / > >=`` and calls of functions that whoever compiles it provides: those that authors write,
``stop_gradient`` (which changes no value), and ``fill(x, number)``, a number in the type of x. What is used once stands
where it is used, in the order of the author and the chain rule. A product that has a name stays open for a sum to fuse,
so in C++ it is ``auto``. The same function gives the same source in every process.
"""

import hashlib
import keyword
import linecache
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastlstm.cells import on_tensors
from fastlstm.cells.graph import HEADS, Node, in_order
from fastlstm.cells.on_tensors import ON_TENSORS
from fastlstm.forks import cached_property

ByName = Callable[[Mapping[str, Any]], dict[str, Any]]  # arguments by name to results by name

_SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "greater": ">", "at_least": ">="}
_STRENGTH = {"greater": 0, "at_least": 0, "add": 1, "sub": 1, "mul": 2, "div": 2}
_NEG = 3
_CPP = (  # but for do, the gradient of an input or a param o, of which the cells in csrc/ have none
    "alignas alignof and asm auto bool break case catch char class const constexpr continue decltype default delete "
    "double else enum explicit export extern false float for friend goto if inline int long mutable namespace new not "
    "nullptr operator or private protected public register return short signed sizeof static struct switch template "
    "this throw true try typedef typename union unsigned using virtual void volatile while xor V"
)
# A derived value may have none of these names
RESERVED = frozenset([*keyword.kwlist, *_CPP.split(), *ON_TENSORS, "tl", HEADS])


@dataclass(eq=False)
class Function:
    """Straight-line code: the nodes of its arguments and of its results, each by name. A call computes on tensors,
    which autograd differentiates; a result that depends on no argument is a number.
    """

    name: str
    arguments: dict[str, Node]
    results: dict[str, Node]

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self._on_tensors(values)

    @cached_property
    def _on_tensors(self) -> ByName:
        return self.by_name(ON_TENSORS, on_tensors.__name__)

    def by_name(self, names: Mapping[str, Any], module: str) -> ByName:
        """Return the function on the values that `names` compute with, see `load`."""
        takes, gives = tuple(self.arguments), tuple(self.results)
        run = load(python(self), self.name, names, module)
        return lambda values: dict(zip(gives, run(*[values[name] for name in takes])))

    def operations(self) -> Counter[str]:
        """Return how often it does each operation."""
        argument_nodes = set(self.arguments.values())
        done = [n.op for n in in_order(self.results.values(), argument_nodes) if n.args and n not in argument_nodes]
        return Counter(op for op in done if op not in ("stop_gradient", "fill"))

    @property
    def count(self) -> int:
        """Return how many operations it does."""
        return self.operations().total()


def statements(function: Function) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (name, expression) for each statement in order, and the expressions of the results."""
    argument_names = {node: name for name, node in function.arguments.items()}
    nodes = sorted(in_order(function.results.values(), argument_names), key=lambda n: n.number)  # as they were written
    uses = Counter(arg for n in nodes if n not in argument_names for arg in n.args)
    uses.update(function.results.values())
    taken, names, lines = {*RESERVED, *function.arguments}, dict(argument_names), list[tuple[str, str]]()
    of_results = {node: name for name, node in function.results.items()}

    def text(node: Node, least: int = 0) -> str:
        if node in names or node.op == "input":  # the latter is no argument, but known where the function is loaded
            return names.get(node, node.value)
        if node.op == "constant":
            return repr(node.value) if node.value >= 0 else f"({node.value!r})"
        if node.op == "neg":
            return f"-{text(node.args[0], _NEG)}" if least < _NEG else f"(-{text(node.args[0], _NEG)})"
        if node.op not in _SYMBOLS:
            return f"{node.op}({', '.join(map(text, node.args))})"
        strength = _STRENGTH[node.op]
        result = f"{text(node.args[0], strength)} {_SYMBOLS[node.op]} {text(node.args[1], strength + 1)}"
        return f"({result})" if strength < least else result

    for node in nodes:
        if node in argument_names or not node.args:
            continue
        if uses[node] > 1 or node in of_results:
            wanted = of_results.get(node) or node.hint or f"v{len(lines)}"
            while wanted in taken:
                wanted += "_"
            taken.add(wanted)
            lines.append((wanted, text(node)))
            names[node] = wanted
    return lines, [text(node) for node in function.results.values()]


def python(function: Function, name: str | None = None) -> str:
    """Return the source of a Python function of the arguments, in order, that returns a tuple of the results."""
    lines, results = statements(function)
    body = "".join(f"    {name} = {value}\n" for name, value in lines)
    returned = f"{', '.join(results)}{',' if len(results) == 1 else ''}" or "()"
    return (
        f"def {name or function.name}({', '.join(function.arguments)}):\n"
        f'    """{", ".join(function.results)}"""\n{body}    return {returned}\n'
    )


def load(source: str, name: str, names: Mapping[str, Any], module: str = __name__) -> Callable[..., Any]:
    """Return the function of this name in `source`, which can be read back, as ``triton.jit`` does. `names`: the
    functions that it calls. `module`: where it belongs, and where some compilers look these up.
    """
    file = f"<derived {name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file
    namespace: dict[str, Any] = {"__name__": module, **names}
    exec(compile(source, file, "exec"), namespace)
    function: Callable[..., Any] = namespace[name]
    return function
