"""What is said to who writes something near to what is right."""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from fastlstm.cells.functions import FUNCTIONS

F = TypeVar("F", bound=Callable[..., Any])

_TWO = "fastlstm.cells.{}(a, b), which is of two values and not over units,"
_VARIANCE = "mean((a - mean(a)) ** 2)"

# Names of functions and methods of torch, NumPy and math, and what a cell's author is to write in the place of each
INSTEAD = {name: f"fastlstm.cells.{name}" for name in FUNCTIONS} | {
    "logsigmoid": "fastlstm.cells.log_sigmoid",
    "hardsigmoid": "fastlstm.cells.hard_sigmoid",
    "detach": "fastlstm.cells.stop_gradient",
    "clip": "fastlstm.cells.clamp",
    "apply": "fastlstm.cells.surrogate(a, slope), or stop_gradient(a) for a derivative of zero,",
    "layer_norm": 'fastlstm.cells.layer_norm(a, weight=gain, bias=shift) with params={"gain": 1.0, "shift": 0.0}',
    "rms_norm": 'fastlstm.cells.rms_norm(a, weight=gain) with params={"gain": 1.0}',
    **{name: _TWO.format("maximum") for name in ("max", "amax")},
    **{name: _TWO.format("minimum") for name in ("min", "amin")},
    "var": f"{_VARIANCE}, which has correction=0,",
    "std": f"sqrt({_VARIANCE}), which has correction=0,",
    "sum": "mean(a), times the number of units,",
    "norm": "sqrt(mean(a * a)), times the root of the number of units,",
    **dict.fromkeys(("chunk", "split", "unbind", "tensor_split"), "a gate for each part"),
    **dict.fromkeys(
        ("matmul", "mm", "bmm", "mv", "dot", "einsum", "linear"), 'w(a), with products=("w",) beside gates,'
    ),
    "silu": "a * sigmoid(a)",
    "gelu": "a * sigmoid(1.702 * a), which is near to it,",
    "softsign": "a / (1 + abs(a))",
    "elu": "where(a > 0, a, exp(a) - 1)",
    "leaky_relu": "where(a > 0, a, 0.01 * a)",
    "softmax": "exp(a) / mean(exp(a)), which is a softmax over units times their number and may overflow,",
}


def instead(name: str | None) -> str | None:
    """Return what a cell's author is to write in the place of a function of this name, or None."""
    if name not in INSTEAD:
        return None
    return f"a cell has functions of its own: write {INSTEAD[name]} in the place of this {name}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about a misspelt name: a question, or nothing if no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def checked_by(check: Callable[..., None]) -> Callable[[F], F]:
    """Return a decorator that first calls `check` with each call's arguments, to say more than Python's own error."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return function(*args, **kwargs)

        return cast(F, checked)

    return decorate
