"""The settings of a process: which backend runs layers that name none, and what `auto` may do.

They are plain module variables. Dynamo guards on these, while it can neither trace a ContextVar nor guard os.environ.
"""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar, cast, get_args

import torch

Backend = Literal[
    "auto",
    "numba",
    "numba-bf16",
    "numba-bf16x3",
    "numba-bf16x6",
    "native",
    "triton",
    "triton-ieee",
    "triton-tf32",
    "reference",
    "aten",
]
NAMES: tuple[str, ...] = get_args(Backend)
F = TypeVar("F", bound=Callable[..., Any])


def check_name(name: str, argument: str = "backend") -> str:
    """Return `name` if it is one of `NAMES`, or raise ValueError."""
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


default = check_name(os.environ.get("FASTLSTM_BACKEND", "auto"), "FASTLSTM_BACKEND")


class use_backend:
    """From this call on, layers that name no backend of their own use `name`: one of `NAMES`.

    As a context manager, ``with use_backend(name):``, it puts back the default from before this call when the context
    ends. As a decorator it does so for each call of the function.

    Raises:
        ValueError: for an unknown name; the default then stays.
    """

    def __init__(self, name: Backend) -> None:
        global default
        self._name, self._previous = name, default
        default = check_name(name)

    def __call__(self, function: F) -> F:
        self.__exit__()  # only the function runs with this default

        @wraps(function)
        def within(*args: Any, **kwargs: Any) -> Any:
            with use_backend(self._name):
                return function(*args, **kwargs)

        return cast(F, within)

    def __enter__(self) -> None:
        global default
        default = self._name  # again: another default may have been set since this was made

    def __exit__(self, *exception: object) -> None:
        global default
        default = self._previous


_invariant = False


class batch_invariant:
    """From this call on, the outputs of a row do not depend on the rows beside it, nor on how a sequence is cut up.

    Without it, `auto` may choose the instructions by the numbers of rows and steps. On processors with a matrix unit
    (AMX) it multiplies float32 in pieces of bfloat16 for 64 rows, 8 steps and 32 units or more. That is faster and as
    exact, but it rounds elsewhere. Some steps of cells may take torch's operator, which rounds elsewhere too.
    `torch.use_deterministic_algorithms(True)` has the same effect as this setting. Both hold for the backend `numba`.
    Sums over rows, such as gradients of weights, depend on which rows there are in any case.

    As a context manager, ``with batch_invariant():``, it puts back what was set before when the context ends.

    Args:
        enabled: whether outputs are to be so.

    Raises:
        TypeError: if `enabled` is no bool.
    """

    def __init__(self, enabled: bool = True) -> None:
        global _invariant
        check_bool("enabled", enabled)
        self._enabled, self._previous = enabled, _invariant
        _invariant = self._enabled

    def __enter__(self) -> None:
        global _invariant
        _invariant = self._enabled  # again: another call may have changed it since

    def __exit__(self, *exception: object) -> None:
        global _invariant
        _invariant = self._previous


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError if the argument of this name is no bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def invariant() -> bool:
    """Return whether `batch_invariant` or torch's setting asks for outputs that do not depend on other rows."""
    return _invariant or torch.are_deterministic_algorithms_enabled()


def named(name: str | None) -> str:
    """Return `name`, or the default that `use_backend` sets if `name` is None."""
    return default if name is None else name
