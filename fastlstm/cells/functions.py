"""The functions that a cell may call.

Each takes values of a cell that is being declared, tensors, or Python floats, all elementwise. So a cell's function can
also be called on tensors, which autograd differentiates, and on numbers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastlstm.cells.graph import Node
from fastlstm.cells.on_tensors import ON_TENSORS


def _function(declared: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a cell from what it is on floats."""
    name, arity = declared.__name__, declared.__code__.co_argcount

    @functools.wraps(declared)
    def function(*args: Any) -> Any:
        if len(args) != arity:
            raise TypeError(f"{name} takes {arity} argument{'s' * (arity > 1)}, got {len(args)}")
        for a in args:
            if isinstance(a, Node):
                strange = next((b for b in args if not isinstance(b, Node | int | float)), None)
                if strange is not None:
                    raise TypeError(f"{name} takes values and numbers, not {type(strange).__name__}")
                return a.graph.make(name, *args)
        on_tensors = any(isinstance(a, Tensor) for a in args)
        return (ON_TENSORS[name] if on_tensors else declared)(*args)

    return function


@_function
def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``. Equivalent to `torch.sigmoid`."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


@_function
def tanh(x: Any) -> Any:
    """The hyperbolic tangent. Equivalent to `torch.tanh`."""
    return math.tanh(x)


@_function
def relu(x: Any) -> Any:
    """x where it is greater than 0, else 0; its derivative at 0 is 0. Equivalent to `torch.relu`."""
    return 0.0 if x < 0 else x


@_function
def exp(x: Any) -> Any:
    """e to the power of x. Equivalent to `torch.exp`."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@_function
def log_sigmoid(x: Any) -> Any:
    """``log(sigmoid(x))``, without overflow. Equivalent to `torch.nn.functional.logsigmoid`."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


@_function
def maximum(a: Any, b: Any) -> Any:
    """The greater of two values, NaN if either is. Equivalent to `torch.maximum`."""
    return a if a > b or a != a else b


@_function
def where(condition: Any, a: Any, b: Any) -> Any:
    """a where a comparison holds, else b. Equivalent to `torch.where`."""
    return a if condition else b


@_function
def stop_gradient(x: Any) -> Any:
    """x itself, whose derivatives count as zero. Equivalent to `torch.Tensor.detach`."""
    return x


@_function
def mean(x: Any) -> Any:
    """The mean over the H units of a row, for every unit."""
    return x


@_function
def rsqrt(x: Any) -> Any:
    """1 / sqrt(x)."""
    return 1.0 / math.sqrt(x)


FUNCTIONS = {f.__name__: f for f in (sigmoid, tanh, relu, exp, log_sigmoid, maximum, where, stop_gradient, mean, rsqrt)}
ALLOWED = f"+ - * / < > <= >= and {' '.join(FUNCTIONS)}"
