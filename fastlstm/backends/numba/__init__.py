"""Recurrent layers on the CPU: kernels compiled by Numba when first used, all time steps of a layer in one call.

A tile of batch rows by four vectors stays in registers over the whole sum. Weights are packed for it at every call, or
once for many calls. Threads split the batch rows, or the hidden units where rows are few.

The folder has three rooms. `host` is what runs in Python: sizes, buffers, packed weights, plans. `kernels` are the two
passes, in the Python that `llvm.emit` compiles. `llvm` is what emits instructions: these, tiles of products, cells,
copies.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from fastlstm.backends.base import Traits
from fastlstm.backends.numba.host import plans, sizes, streams
from fastlstm.backends.numba.host.forward import saved_shape
from fastlstm.torch_private import constant

_ALWAYS = Traits(plans=True, plans_sixteen_bits=True, sorts_lengths=True, heads=True, plans_stacks=True)
TRAITS = replace(_ALWAYS, prepares_steps=True)
_INSTALLED = importlib.util.find_spec("numba") is not None
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of a float32, by the precision of its products. Fewer than 32 rows leave the unit half idle, and three pieces are half
# as many bytes of weights again: then it beats float32's own instructions from about 32 rows a thread on. How many rows
# there are must not decide, since a row's bits do not depend on the rows beside it: so each precision has a name.
PIECES = {"bf16": 1, "bf16x3": 2, "bf16x6": 3}
_OWN = {"max": max, "min": min}
_failure: str | None = None
_tried = False


@contextmanager
def _own_builtins() -> Iterator[None]:
    """In place of those that torch.export puts there while it traces, which an older numba cannot be imported with."""
    found = {name: getattr(builtins, name) for name in _OWN}
    vars(builtins).update(_OWN)
    try:
        yield
    finally:
        for name, own in _OWN.items():
            if getattr(builtins, name) is own:  # an export of another thread may have begun since
                setattr(builtins, name, found[name])


@constant
def failure() -> str | None:
    """Why the numba that is installed cannot be used, or None. The first call imports it, for all that follow."""
    global _failure, _tried
    if not _tried and _INSTALLED:
        try:
            with _own_builtins():
                importlib.import_module("fastlstm.backends.numba.host.tasks")
        except Exception as error:  # whatever a broken installation, or a numba newer than this backend, raises
            _failure = f"the numba backend cannot use the numba that is installed: {type(error).__name__}: {error}"
        _tried = True
    return _failure


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be taken, or None. 16-bit tensors are computed in float32, but for products of bfloat16
    where the processor has a unit for them.
    """
    if device.type not in ("cpu", "meta"):
        return f"the numba backend needs CPU tensors, got {device.type}"
    if dtype not in _DTYPES:
        return f"the numba backend needs float32, float64, bfloat16 or float16, got {dtype}"
    return failure() if _INSTALLED else "the numba backend needs numba, which is not installed"


@constant
def cache_folder() -> str | None:
    """The folder in which compiled kernels stay for later processes, or None where no such folder can be written or
    numba cannot be used.
    """
    if not _INSTALLED or failure() is not None:
        return None
    folder: str | None = importlib.import_module("fastlstm.backends.numba.host.compiling").folder()
    return folder


def compile_ahead(runs: Sequence[Callable[[], object]]) -> None:
    """Compile the kernels that calls need, in as many processes as a call may have threads, but at most 8: for more
    there are too few kernels. Without a folder to keep the kernels in nothing is done. See
    `fastlstm.backends.numba.host.ahead`.
    """
    workers = min(torch.get_num_threads(), 8)
    if runs and workers > 1 and cache_folder() is not None:
        importlib.import_module("fastlstm.backends.numba.host.ahead").compile_ahead(runs, workers)


@constant
def most_pieces() -> int:
    """Into how many pieces of bfloat16 a number may go for products that the processor has a unit for, see `PIECES`: 0
    where there is none, or numba cannot be used.
    """
    return sizes.most_pieces() if _INSTALLED and failure() is None else 0


def with_precision(precision: str) -> SimpleNamespace:
    """This backend with products of bfloat16 in place of float32's: of a precision of `PIECES`."""
    name, pieces = f"numba-{precision}", PIECES[precision]

    def supports_precision(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return f"the {name} backend needs float32, bfloat16 or float16, got {dtype}"
        needed = "AMX" if pieces > 1 else "AMX, or with a vdpbf16ps of twice float32's rate"
        missing = f"the {name} backend needs a processor with {needed}, and a system that lets this process use it"
        return supports(device, dtype) or (None if pieces <= most_pieces() else missing)

    def with_pieces(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            # an export may have been recorded on another processor
            return function(*args, pieces=pieces if pieces <= most_pieces() else 0, **options)

        return call

    functions = {f.__name__: with_pieces(f) for f in (plans.forward, plans.backward, plans.plan)}
    return SimpleNamespace(supports=supports_precision, saved_shape=saved_shape, TRAITS=_ALWAYS, **functions)


forward, backward, plan = plans.forward, plans.backward, plans.plan
steps = streams.steps
