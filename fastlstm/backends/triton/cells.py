"""The cells' derived functions through ``triton.jit``, with sigmoid and tanh as a GPU computes them: exact, for float32
in full precision and in the interpreter, and fast, for tf32 and 16 bits, where one instruction gives tanh to 11 bits.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from math import inf
from typing import Any

import triton
import triton.language as tl

from fastlstm.backends.triton import products
from fastlstm.backends.triton.device import INTERPRET
from fastlstm.cells.emit import Function, load, python
from fastlstm.cells.graph import HEADS, MEANS, Node, in_order
from fastlstm.cells.spec import Cell


@triton.jit
def tanh(x):
    y = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))  # exp may overflow to infinity: the result is then 1
    # Near zero that difference cancels: (tanh(x) / x - 1) / x^2 fitted for |x| < 0.63, to 8e-8 of tanh(x)
    z = x * x
    p = -0.33333275 + z * (0.13331266 + z * (-0.05372539 + z * (0.02059296 - z * 0.00565376)))
    return tl.where(tl.abs(x) < 0.625, x + x * (z * p), y)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def approximate_tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


fast_tanh = tanh if INTERPRET else approximate_tanh


@triton.jit
def fast_sigmoid(x):
    return 0.5 * fast_tanh(0.5 * x) + 0.5


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)  # NaN stays


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def sqrt(x):
    return tl.sqrt_rn(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)  # NaN if either is


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def stop_gradient(x):
    return x


@triton.jit
def fill(x, value):
    return tl.full(x.shape, value, tl.float32)


# The interpreter looks for tl in a function's globals
_COMMON = {
    "relu": relu, "exp": exp, "log_sigmoid": log_sigmoid, "sqrt": sqrt, "rsqrt": rsqrt, "log": log,
    "maximum": maximum, "where": where, "stop_gradient": stop_gradient, "fill": fill, "tl": tl,
}  # fmt: skip
EXACT = {"sigmoid": sigmoid, "tanh": tanh, **_COMMON}
FAST = {"sigmoid": fast_sigmoid, "tanh": fast_tanh, **_COMMON}
# A program has all units that a mean is over, and padding behind them
_MEAN = """
def mean(x, heads=1):
    there = tl.arange(0, x.shape[0])[:, None] < {units}
    return tl.broadcast_to((tl.sum(tl.where(there, x, 0.0), 0) * {share!r})[None, :], x.shape)
"""
# A weight is (P, P) with its low part and its scale, as `products.product` takes them. Padding may be NaN
_PRODUCT = """
def product(x, weight):
    there = tl.arange(0, x.shape[0])[:, None] < {units}
    return multiply(weight[0], weight[1], weight[2], tl.where(there, x, 0.0), {precision!r}, True)
"""
_TRANSPOSED = """
def transposed_product({arguments}):
    return {total}
"""


def means_of(cell: Cell) -> set[str]:
    """Return the operations by which units of the cell see each other."""
    return cell.derived().means


class CellFunctions:
    """A cell's compiled functions, and what the kernels have to know of it.

    Attributes:
        forward: (pre-activations in the order of `Layout.preacts`, states, params, inputs, weights of products) -> the
            new states and the saved values.
        backward: (the new states' gradients, saved values, states of `read`, params, inputs, transposed weights of
            products) -> the gradients of the pre-activations, the carried states, params, inputs and products.
        read: which states backward reads: 2 k for state k after the step, and 2 k + 1 for state k before it.
        carried: for each state where its gradient is among those of the carried states, or -1.
        preacts, h_preacts: how many pre-activations there are, and for how many of them, the last, h is multiplied.
        gates: how many gates one product computes: all, if there are 2 or 4 and each has both products, since then they
            fall into place; otherwise 1.
        output_exceeds_one: whether the output may be beyond 1 or -1.
        reads_h: whether forward reads h_prev, beside its product.
        backward_divides: whether a gradient may be NaN where all values are zero.

    Args:
        units: how many units a mean is over, or products multiply: of a row or of a head, or 0 without either.
    """

    def __init__(self, cell: Cell, precision: str, units: int = 0) -> None:
        layout, derived = cell.layout, cell.derived()
        names, version = (EXACT, "exact") if precision == "ieee" else (FAST, "fast")
        if cell.products:
            names = names | _products(cell, precision, units, names)
            version = f"{precision}_of_{units}"
        if derived.means:
            source, version = _MEAN.format(units=units, share=1 / units), f"{version}_of_{units}"
            mean = triton.jit(load(source, "mean", names, __name__))
            names = names | {"mean": mean, "mean_of_head": mean, HEADS: tl.constexpr(1)}
        new, old = list(layout.states), [f"{state}_prev" for state in layout.states]
        preacts = [f"{gate}_pre" for gate in layout.preacts]
        operands = [*layout.params, *layout.inputs, *cell.products]
        arguments = [*(f"d{state}" for state in new), *layout.saved, *derived.states_read, *operands]
        carried = [f"d{state}_prev" for state in layout.carried]
        results = [*(f"d{name}" for name in preacts), *carried, *(f"d{name}" for name in operands)]
        self.forward = _compiled(derived.forward, [*preacts, *old, *operands], [*new, *layout.saved], names, version)
        self.backward = _compiled(derived.backward, arguments, results, names, version)
        state_names = [name for both in zip(new, old) for name in both]
        self.read = tuple(state_names.index(name) for name in derived.states_read)
        self.carried = tuple(layout.carried.index(state) if state in layout.carried else -1 for state in new)
        self.preacts, self.h_preacts = len(preacts), len(layout.h_preacts)
        self.gates = self.preacts if layout.joint and self.preacts in (2, 4) else 1
        self.output_exceeds_one = _bound(derived.forward.results[new[0]]) > 1
        self.reads_h = old[0] in derived.forward.arguments
        self.backward_divides = bool({"div", "rsqrt"} & derived.backward.operations().keys())


cell_functions = cache(CellFunctions)


def _products(cell: Cell, precision: str, units: int, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return a cell's `product` and `transposed_product` by name. The latter takes a fixed number of pairs or Nones."""
    source = _PRODUCT.format(units=units, precision=precision)
    product = triton.jit(load(source, "product", {**names, "multiply": products.product}, __name__))
    pairs = range(max(map(len, cell.layout.product_groups)))
    arguments = ", ".join(f"g{k}, w{k}" if k == 0 else f"g{k}=None, w{k}=None" for k in pairs)
    total = "product(g0, w0)" + "".join(f" + (product(g{k}, w{k}) if g{k} is not None else 0.0)" for k in pairs[1:])
    source = _TRANSPOSED.format(arguments=arguments, total=total)
    transposed = triton.jit(load(source, "transposed_product", {**names, "product": product}, __name__))
    return {"product": product, "transposed_product": transposed}


def _compiled(
    function: Function, arguments: Sequence[str], results: Sequence[str], names: Mapping[str, Any], version: str
) -> Any:
    """Compile a function of these `arguments`, and `results` or zeros, in order. `version`: what `names` mean."""
    graph = next(iter(function.results.values())).graph
    inputs = {name: function.arguments.get(name, graph.input(name)) for name in arguments}
    like = next(iter(inputs.values()))

    def result(name: str) -> Node:
        value = function.results.get(name, graph.constant(0))
        return graph.make("fill", like, value) if value.is_constant() else value

    complete = Function(function.name, inputs, {name: result(name) for name in results})
    digest = hashlib.sha256(python(complete).encode()).hexdigest()[:16]
    name = f"{function.name}_{version}_{digest}"  # by which Triton tells the kernels apart that it has compiled
    return triton.jit(load(python(complete, name), name, names, __name__))


def _bound(result: Node) -> float:
    """Return a bound of the absolute value, which is infinite if none is known."""
    bounds: dict[Node, float] = {}
    for node in in_order([result]):
        bounds_of_args = [bounds[a] for a in node.args]
        bound = inf
        if node.op == "constant":
            bound = abs(float(node.value))
        elif node.op in ("sigmoid", "tanh"):
            bound = 1.0
        elif node.op in ("add", "sub"):
            bound = sum(bounds_of_args)
        elif node.op == "mul" and inf not in bounds_of_args:
            bound = bounds_of_args[0] * bounds_of_args[1]
        elif node.op in ("neg", "relu", "stop_gradient", "maximum", *MEANS):
            bound = max(bounds_of_args)
        elif node.op == "where":
            bound = max(bounds_of_args[1:])
        bounds[node] = bound
    return bounds[result]
