"""The functions that a cell may call.

Each takes values of a cell that is being declared, tensors, or Python floats. So a cell's function can also be called
on tensors, whose last axis is the units and which autograd differentiates, and on numbers.

All but `mean` and the norms are elementwise. The functions in `PRIMITIVES` are operations of the graph, which every
backend has to know. The others are written with these.
"""

import functools
import math
import operator
from builtins import abs  # noqa: A004  # a value has __abs__
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastlstm.cells.graph import HEADS, Node, check_no_array
from fastlstm.cells.on_tensors import ON_TENSORS

_IN_CELLS = Node, int, float
_ELSEWHERE = Tensor, int, float  # tuples, since Dynamo of torch 2.9 knows no union


def _check_values(name: str, *args: Any, hint: str = "") -> None:
    """Raise TypeError, with a `hint` about sequences, unless the arguments of the function `name` are values of a cell,
    or tensors, and numbers. A bool counts as neither: ``weight=True`` would be a weight of 1.
    """
    in_cell = any(isinstance(a, Node) for a in args)
    kinds: tuple[type, ...] = _IN_CELLS if in_cell else _ELSEWHERE
    for a in args:
        is_number = isinstance(a, kinds) or (not in_cell and hasattr(a, "__float__"))  # as NumPy's numbers have
        if is_number and (not isinstance(a, bool) or (name == "where" and not in_cell)):  # a comparison of numbers
            continue
        if in_cell:
            check_no_array(a)
        takes = f"{name} takes {'a value or a number' if len(args) == 1 else 'values and numbers'}"
        if not isinstance(a, (tuple, list)):
            raise TypeError(f"{takes}, got {type(a).__name__}")
        hint = hint or "layer_norm returns one value for each that it is given; pass weight= and bias= by name"
        raise TypeError(f"{takes}, got a {type(a).__name__} of {len(a)}: {hint}")


def _function(declared: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a cell, from the function that computes it on floats."""
    name, arity = declared.__name__, declared.__code__.co_argcount

    @functools.wraps(declared)
    def function(*args: Any) -> Any:
        if len(args) != arity:
            raise TypeError(f"{name} takes {arity} argument{'s' * (arity > 1)}, got {len(args)}")
        _check_values(name, *args)
        for a in args:
            if isinstance(a, Node):
                return a.graph.make(name, *args)
        return (ON_TENSORS[name] if any(isinstance(a, Tensor) for a in args) else declared)(*args)

    return function


@_function
def sigmoid(x: Any) -> Any:
    """Return ``1 / (1 + exp(-x))``. Equivalent to `torch.sigmoid`."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


@_function
def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent. Equivalent to `torch.tanh`."""
    return math.tanh(x)


@_function
def relu(x: Any) -> Any:
    """Return x where it is greater than 0, else 0. The derivative at 0 is 0. Equivalent to `torch.relu`."""
    return 0.0 if x < 0 else x


@_function
def exp(x: Any) -> Any:
    """Return e to the power of x. Equivalent to `torch.exp`."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@_function
def log_sigmoid(x: Any) -> Any:
    """Return ``log(sigmoid(x))``, without overflow. Equivalent to `torch.nn.functional.logsigmoid`."""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


@_function
def maximum(a: Any, b: Any) -> Any:
    """Return the greater of two values, or NaN if either is NaN. Equivalent to `torch.maximum`."""
    return a if a > b or a != a else b


@_function
def where(condition: Any, a: Any, b: Any) -> Any:
    """Return a where a comparison holds, else b. Equivalent to `torch.where`."""
    return a if condition else b


@_function
def stop_gradient(x: Any) -> Any:
    """Return x itself. Its derivatives count as zero. Equivalent to `torch.Tensor.detach`."""
    return x


def mean(x: Any, of: str = "row") -> Any:
    """Return the mean over the H units of a row, or over the H / K units of a head. Each of the units gets it.

    Args:
        of: "row" or "head".

    Raises:
        ValueError: for another `of`.

    Equivalent to ``x.mean(-1, keepdim=True)``, expanded to the shape of x. So tensors of the units of one head along
    the last axis give a mean of the head.
    """
    _check_values("mean", x)
    if of not in ("row", "head"):
        raise ValueError(f'of must be "row" or "head", got {of!r}')
    if isinstance(x, Node):
        return x.graph.make("mean", x) if of == "row" else x.graph.make("mean_of_head", x, x.graph.input(HEADS))
    return ON_TENSORS["mean"](x) if isinstance(x, Tensor) else x


@_function
def sqrt(x: Any) -> Any:
    """Return the square root, which is NaN for a negative number. Equivalent to `torch.sqrt`."""
    return math.sqrt(x) if x >= 0 else math.nan


@_function
def rsqrt(x: Any) -> Any:
    """Return ``1 / sqrt(x)``. Equivalent to `torch.rsqrt`."""
    root = math.sqrt(x) if x >= 0 else math.nan
    return 1.0 / root if root else math.copysign(math.inf, root)


@_function
def log(x: Any) -> Any:
    """Return the natural logarithm, which is NaN for a negative number. Equivalent to `torch.log`."""
    return math.log(x) if x > 0 else -math.inf if x == 0 else math.nan


def square(x: Any) -> Any:
    """Return ``x * x``. Equivalent to `torch.square`."""
    _check_values("square", x)
    return x * x


def minimum(a: Any, b: Any) -> Any:
    """Return the smaller of two values, or NaN if either is NaN. Equivalent to `torch.minimum`."""
    _check_values("minimum", a, b)
    return -maximum(-a, -b)


def clamp(x: Any, min: Any = None, max: Any = None) -> Any:  # noqa: A002
    """Return x within two limits, of which one may be None. The derivative at a limit is 1, and that of NaN is 0.

    Raises:
        ValueError: if both limits are None.

    Equivalent to `torch.clamp`, whose derivative at a limit is 0 from torch 2.14 on.
    """
    if min is None and max is None:
        raise ValueError("clamp needs min or max, got None for both")
    _check_values("clamp", *(a for a in (x, min, max) if a is not None))
    is_within = x <= max if min is None else x >= min  # and NaN is not
    x = where(is_within, x, stop_gradient(x))
    x = x if min is None else where(x < min, min, x)
    return x if max is None else where(x > max, max, x)


def surrogate(value: Any, slope: Any) -> Any:
    """Return 1 where `value` is above 0, else 0: a spike. An infinite value or NaN gives NaN. The derivative by `value`
    counts as `slope`, and no gradient passes into `slope`.

    Usual slopes, as functions of the value v, are ``1 / (1 + square(pi * v))`` of an arctangent, ``1 / square(1 + 25 *
    abs(v))`` of a fast sigmoid, and ``0.3 * relu(1 - abs(v))``, a triangle.

    Neftci, Mostafa and Zenke, Surrogate gradient learning in spiking neural networks, 2019.
    """
    _check_values("surrogate", value, slope)
    return stop_gradient(where(value > 0, 1.0, 0.0)) + (value - stop_gradient(value)) * stop_gradient(slope)


def softplus(x: Any) -> Any:
    """Return ``log(1 + exp(x))``, without overflow. Equivalent to `torch.nn.functional.softplus` without its threshold,
    above which it returns x.
    """
    _check_values("softplus", x)
    return -log_sigmoid(-x)


def hard_sigmoid(x: Any) -> Any:
    """Return ``x / 6 + 1 / 2`` within 0 and 1: `torch.nn.functional.hardsigmoid`. The ends and NaN have slope 0."""
    _check_values("hard_sigmoid", x)
    end_or_nan = where(x >= 3.0, 1.0, stop_gradient(x))
    return where(x <= -3.0, 0.0, where(x < 3.0, (x + 3.0) * (1 / 6), end_or_nan))


def layer_norm(*values: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, of: str = "row") -> Any:
    """Shift and scale values to a mean of 0 and a variance of 1 over the units of each row, then multiply by `weight`
    and add `bias`. Several values are normalized together, over all their units, as the four gates of an LSTM.

    Ba, Kiros and Hinton, Layer normalization, 2016.

    Args:
        values: one or more.
        weight, bias: a value or number for all of them, or a sequence of one for each; None for 1 and 0.
        eps: what is added to the variance.
        of: "row", or "head" to normalize the units of each head by themselves.

    Returns one value for one, and a tuple for several.

    Raises:
        TypeError: for no values, for a number beside values, and for a sequence of another length.

    Equivalent to `torch.nn.functional.layer_norm` of the values side by side along the last axis.
    """
    _check_normed("layer_norm", values, eps)
    center = _mean_of_all(values, of)
    return _normalized("layer_norm", [_called("deviation", v - center) for v in values], weight, bias, eps, of)


def rms_norm(*values: Any, weight: Any = None, eps: float = 2**-23, of: str = "row") -> Any:
    """Divide values by the root of the mean of their squares over the units of each row, then multiply by `weight`.
    Several values are normalized together, over all their units.

    Zhang and Sennrich, Root mean square layer normalization, 2019.

    Args:
        values: one or more.
        weight: a value or number for all of them, or a sequence of one for each; None for 1.
        eps: what is added to the mean of squares. The default is torch's for float32, whatever the dtype.
        of: "row", or "head" to normalize the units of each head by themselves.

    Returns one value for one, and a tuple for several.

    Raises:
        TypeError: for no values, for a number beside values, and for a sequence of another length.

    Equivalent to `torch.nn.functional.rms_norm` of the values side by side along the last axis.
    """
    _check_normed("rms_norm", values, eps)
    return _normalized("rms_norm", values, weight, None, eps, of)


def _check_normed(name: str, values: Sequence[Any], eps: Any) -> None:
    if not values:
        raise TypeError(f"{name} takes one value or more, got none")
    hint = "it takes each value as an argument of its own, and no shape, since it normalizes all units"
    _check_values(name, *values, eps, hint=hint)
    numbers = [n for n, value in enumerate(values) if not isinstance(value, (Node, Tensor))]
    if 0 < len(numbers) < len(values):  # outside a cell all may be numbers
        n = numbers[0]
        raise TypeError(f"argument {n + 1} of {name} must be a value of each unit, got {values[n]!r}: {hint}")


def _called(name: str, value: Any) -> Any:
    """Return the value. It has this name in derived functions unless it has a name already."""
    if isinstance(value, Node) and value.args and value.hint is None:
        value.hint = name
    return value


def _mean_of_all(values: Sequence[Any], of: str) -> Any:
    """Return the mean over all units of all values."""
    total = functools.reduce(operator.add, values)
    return mean(total, of) * (1 / len(values))


def _normalized(name: str, values: Sequence[Any], weight: Any, bias: Any, eps: float, of: str) -> Any:
    """Return values divided by the root of the mean of their squares, times weights, plus biases."""
    scale = _called("scale", rsqrt(_mean_of_all([v * v for v in values], of) + eps))
    results = [v * scale for v in values]
    for kind, apply, each in (("weight", operator.mul, weight), ("bias", operator.add, bias)):
        if each is None:
            continue
        factors = each if isinstance(each, list | tuple) else [each] * len(values)
        if len(factors) != len(values):
            raise TypeError(f"{name} takes a {kind} for each of {len(values)} values, got {len(factors)}")
        _check_values(name, *values, *factors)
        results = list(map(apply, results, factors))
    return results[0] if len(results) == 1 else tuple(results)


PRIMITIVES = {
    f.__name__: f for f in (sigmoid, tanh, relu, exp, log_sigmoid, maximum, where, stop_gradient, sqrt, rsqrt, log)
}
_WRITTEN_WITH_THESE = (mean, abs, square, minimum, clamp, surrogate, softplus, hard_sigmoid, layer_norm, rms_norm)
FUNCTIONS: dict[str, Callable[..., Any]] = {**PRIMITIVES, **{f.__name__: f for f in _WRITTEN_WITH_THESE}}
ALLOWED = "+ - * / ** < > <= >= and the functions of fastlstm.cells, such as sigmoid, where and mean"
