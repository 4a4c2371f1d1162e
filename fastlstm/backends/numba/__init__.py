"""Recurrent layers on the CPU: kernels that are compiled at their first use. One call runs all time steps of a layer.

The *loops* of both passes, over steps, teams, panels and rows, are Python functions of 64-bit integers in `kernels`,
which `llvm.translate` turns into LLVM statement by statement. *Products*, copies and other primitives are explicit LLVM
instructions in `llvm`, since a vectoriser would not keep register tiles in registers. The *cells*, the elementwise part
of a step, are too: a cell's derived source runs once on objects whose operators emit them. Numba compiles all of this
for this processor as bodies of one-line functions, and `host.kernel_files` keeps and loads the code. The rest of `host`
has sizes, buffers, packed weights and plans.

The loops know addresses and strides, and no arrays. A kernel reads one struct of integers, and calls primitives by
address: so it depends on no type and no cell, no types have to be inferred, and no arrays are wrapped for a call.

A register tile of batch rows by four vectors stays in registers over a whole K block. Weights are packed for it in
every call, or once for many calls. Threads split the batch rows, or the hidden units where rows are few.
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
from fastlstm.backends.cpu import threads_now
from fastlstm.backends.numba.host import plans, sizes, streams
from fastlstm.backends.numba.host.forward import saved_shape
from fastlstm.backends.numba.host.interruptions import uninterrupted
from fastlstm.torch_private import constant

_ALWAYS = Traits(
    plans=True, plans_sixteen_bits=True, sorts_lengths=True, heads=True, plans_many=True,
    stack_rank=plans.STACK_RANK, products=True, projections=True,
)  # fmt: skip
TRAITS = replace(_ALWAYS, prepares_steps=True)
_INSTALLED = importlib.util.find_spec("numba") is not None
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The bfloat16 components of a number, by the precision of its products. With fewer than 32 rows the bf16 unit is half
# idle, and three components are half as many bytes of weights again: it beats float32's own instructions from about 32
# rows a thread on. The number of rows must not decide, since a row's bits do not depend on the rows beside it. So each
# precision has a name.
COMPONENTS = {"bf16": 1, "bf16x3": 2, "bf16x6": 3}
_OWN = {"max": max, "min": min}
_failure: str | None = None
_tried = False


@contextmanager
def _own_builtins() -> Iterator[None]:
    """Put Python's `max` and `min` back while torch.export, tracing, replaces them: an older numba needs them."""
    replaced = {name: getattr(builtins, name) for name in _OWN}
    vars(builtins).update(_OWN)
    try:
        yield
    finally:
        for name, own in _OWN.items():
            if getattr(builtins, name) is own:  # an export of another thread may have begun since
                setattr(builtins, name, replaced[name])


@constant
def failure() -> str | None:
    """Return why the installed numba cannot be used, or None. The first call imports it."""
    global _failure, _tried
    if not _tried and _INSTALLED:
        with uninterrupted():
            try:
                with _own_builtins():
                    importlib.import_module("fastlstm.backends.numba.host.tasks")
            except Exception as error:  # whatever a broken installation, or a numba newer than this backend, raises
                _failure = f"the numba backend cannot use the numba that is installed: {type(error).__name__}: {error}"
            _tried = True
    return _failure


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the backend cannot take such tensors, or None. It computes 16 bits in float32, or on the bf16 unit."""
    if device.type not in ("cpu", "meta"):
        return f"the numba backend needs CPU tensors, got {device.type}"
    if dtype not in _DTYPES:
        return f"the numba backend needs float32, float64, bfloat16 or float16, got {dtype}"
    return failure() if _INSTALLED else "the numba backend needs numba, which is not installed"


@constant
def cache_folder() -> str | None:
    """Return the folder of compiled kernels, or None if none can be written or numba cannot be used."""
    if not _INSTALLED or failure() is not None:
        return None
    folder = importlib.import_module("fastlstm.backends.numba.host.kernel_files").folder()
    return None if folder is None else str(folder)


def compile_ahead(runs: Sequence[Callable[[], object]]) -> None:
    """Compile the kernels that calls need, in at most 8 processes. Without a folder for them, do nothing."""
    workers = min(threads_now(), 8)
    if runs and workers > 1 and cache_folder() is not None:
        importlib.import_module("fastlstm.backends.numba.host.ahead").compile_ahead(runs, workers)


@constant
def max_components() -> int:
    """Return the most `COMPONENTS` for which the processor has a unit: 0 without one, or if numba cannot be used."""
    return sizes.max_components() if _INSTALLED and failure() is None else 0


def with_precision(precision: str) -> SimpleNamespace:
    """Return this backend with products of bfloat16, in a precision of `COMPONENTS`, in place of float32's."""
    name, components = f"numba-{precision}", COMPONENTS[precision]

    def supports_precision(device: torch.device, dtype: torch.dtype) -> str | None:
        if dtype == torch.float64:
            return f"the {name} backend needs float32, bfloat16 or float16, got {dtype}"
        needed = "AMX" if components > 1 else "AMX, or with a vdpbf16ps of twice float32's rate"
        missing = f"the {name} backend needs a processor with {needed}, and a system that lets this process use it"
        return supports(device, dtype) or (None if components <= max_components() else missing)

    def with_components(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            # an export may have been recorded on another processor
            return function(*args, components=components if components <= max_components() else 0, **options)

        return call

    functions = {f.__name__: with_components(f) for f in (plans.forward, plans.backward, plans.plan)}
    return SimpleNamespace(supports=supports_precision, saved_shape=saved_shape, TRAITS=_ALWAYS, **functions)


forward, backward, plan = plans.forward, plans.backward, plans.plan
steps = streams.steps
