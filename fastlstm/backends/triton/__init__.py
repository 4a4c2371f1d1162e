"""Layers of any cell on NVIDIA GPUs: Triton kernels compiled when first used.

`tiles` chooses between one launch for all time steps (`resident`) and one launch a step (`stepwise`). The gradients of
the weights, the bias and the input are products over all steps at once and go to torch. Under ``TRITON_INTERPRET=1``
the same kernels run on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from threading import Lock
from types import SimpleNamespace
from typing import Any, cast

import torch

from fastlstm.backends import base
from fastlstm.backends.base import Gradients, Layer, Run, Traits
from fastlstm.cells.spec import Cell

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")  # as triton reads it
TRAITS = Traits(takes_sixteen_bits=True, plans=True, plans_sixteen_bits=True, heads=True)
failures: dict[tuple[torch.device, Cell], str] = {}  # cells whose first call has failed its check on a device, and how
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTALLED = importlib.util.find_spec("triton") is not None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter is as large as an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be taken, or None."""
    if dtype not in _DTYPES:
        return f"the triton backend needs float32, bfloat16 or float16, got {dtype}"
    if device.type not in ("cuda", "meta", *["cpu"] * INTERPRET):
        return f"the triton backend needs CUDA tensors (or the environment's TRITON_INTERPRET=1), got {device.type}"
    if not _INSTALLED:
        return "the triton backend needs the package triton, which is not installed"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the triton backend needs an NVIDIA GPU, this torch is built for ROCm"
    if (found := capability(device)) < (8, 0):
        return "the triton backend needs compute capability 8.0, got {}.{}".format(*found)
    return None


def check(layer: Layer, precision: str | None = None) -> str | None:
    """Why there are no kernels for a layer of tensors that are supported, or None. Those that there are, are checked at
    their first use: see `fastlstm.backends.triton.first_call`. `failures` then has what was found.
    """
    x = layer.x
    if supports(x.device, x.dtype) is not None:
        return None
    from fastlstm.backends.triton import first_call, launch

    precision = resolve_precision(x.dtype, precision)
    reason = launch.lacks(layer, precision)
    if reason is None and first_call.applies(x.device):
        first_call.check(layer, precision)
    return reason


def saved_shape(cell: Cell, T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Shape of what forward saves beside the states."""
    return T, B, len(cell.layout.saved) * H


def with_precision(precision: str) -> SimpleNamespace:
    """This backend with "ieee" or "tf32" products in float32, whatever torch's setting says."""
    named = {function.__name__: function for function in (check, forward, backward, plan)}
    functions = {name: partial(function, precision=precision) for name, function in named.items()}
    return SimpleNamespace(supports=supports, saved_shape=saved_shape, TRAITS=TRAITS, **functions)


def resolve_precision(dtype: torch.dtype, precision: str | None) -> str:
    """How products are done: "native" in 16 bits; in float32 "ieee" or "tf32", None following torch as nn.LSTM does."""
    if dtype != torch.float32:
        return "native"
    if precision is None:
        precision = cast(Any, torch.backends.cudnn.rnn).fp32_precision  # cudnn.allow_tf32 sets it too
    return "tf32" if precision == "tf32" else "ieee"


_setting = Lock()  # one layer at a time, or the first to leave would restore what the second still needs


def products_in(precision: str) -> AbstractContextManager[object]:
    """Within, torch's own products of float32 have the precision of the recurrent ones."""
    return nullcontext() if precision == "native" else _products(precision)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """The same in float32, whatever products outside a layer have.

    torch has one setting for the process. Meanwhile, a product of another Python thread may follow this one, and torch
    does not tell it what ``allow_tf32`` is. A setting that is the general one is taken to follow that.
    """
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    with _setting:
        found = matmul.fp32_precision
        if (precision == "tf32") == (found == "tf32"):
            yield
            return
        inherited = found in (backends.cudnn.fp32_precision, backends.fp32_precision)
        matmul.fp32_precision = precision
        try:
            yield
        finally:
            matmul.fp32_precision = "none" if inherited else found


def plan(
    layer: Layer, save: bool, kept: dict[Any, Any] | None, ends: tuple[int, ...], precision: str | None = None
) -> base.Plan:
    """A plan for calls like that of `layer`. It keeps no weights, so `kept` stays as it is. `ends` are leading axes of
    the states.
    """
    from fastlstm.backends.triton import plans

    return plans.Plan(layer, save, ends, precision)


def forward(layer: Layer, save: bool, precision: str | None = None) -> Run:
    """See `fastlstm.backends.reference.forward`."""
    from fastlstm.backends.triton import launch

    return launch.Forward(layer, save, resolve_precision(layer.x.dtype, precision)).run(layer)


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients, precision: str | None = None) -> Gradients:
    """See `fastlstm.backends.reference.backward`."""
    from fastlstm.backends.triton import gradients

    return gradients.Backward(layer, needs, resolve_precision(layer.x.dtype, precision)).run(grads, layer, run)
