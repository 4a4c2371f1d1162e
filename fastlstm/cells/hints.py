"""What is said to who writes something near to what is right."""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from fastlstm.cells.functions import FUNCTIONS

F = TypeVar("F", bound=Callable[..., Any])

# Names of functions and methods of torch, NumPy and math, and the function of `fastlstm.cells` that stands for each
INSTEAD = {name: name for name in FUNCTIONS} | {
    "logsigmoid": "log_sigmoid",
    "hardsigmoid": "hard_sigmoid",
    "detach": "stop_gradient",
    "max": "maximum",
    "min": "minimum",
    "clip": "clamp",
    "var": "mean",
}


def instead(name: str | None) -> str | None:
    """Return what a cell's author is to write in the place of a function of this name, or None."""
    if name not in INSTEAD:
        return None
    return f"a cell has functions of its own: write fastlstm.cells.{INSTEAD[name]} in the place of this {name}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about a misspelt name: a question, or nothing if no known name is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def checked_by(check: Callable[..., None]) -> Callable[[F], F]:
    """Return a decorator that calls `check` with the arguments of each call first.

    What it raises says more than Python's own error for arguments that do not fit.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return function(*args, **kwargs)

        return cast(F, checked)

    return decorate
