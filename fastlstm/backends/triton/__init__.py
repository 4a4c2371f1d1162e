"""Layers of any cell on NVIDIA GPUs: Triton kernels compiled when first used.

`tiles` chooses between one launch for all time steps (`resident`) and one launch a step (`stepwise`). Where the
environment has ``FASTLSTM_TRITON_GRID=1``, large layers run in one launch whose programs meet after each step (`grid`),
if they can. The gradients of the weights, the bias and the input are products over all steps at once and go to torch.
Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, but for those of `grid`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from fastlstm.backends import base, sums
from fastlstm.backends.base import WEIGHTS, Gradients, Layer, Run, Traits
from fastlstm.cells.spec import Cell

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")  # as triton reads it
TRAITS = Traits(takes_sixteen_bits=True, plans=True, plans_sixteen_bits=True)
Start = Callable[..., Any]  # what starts a kernel: see `launch.start_anew`
failures: dict[tuple[torch.device, Cell], str] = {}  # cells whose first call has failed its check on a device, and how
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INSTALLED = importlib.util.find_spec("triton") is not None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter is as large as an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; what stands in for a GPU is as large as an H100."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 132


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


def check(layer: Layer, precision: str | None = None) -> None:
    """Check the kernels of a layer at their first use: see `fastlstm.backends.triton.first_call`. `failures` then has
    what was found.
    """
    x = layer.x
    if supports(x.device, x.dtype) is None:
        from fastlstm.backends.triton import first_call

        if first_call.applies(x.device):
            first_call.check(layer, resolve_precision(x.dtype, precision))


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


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """torch's own products of float32 in the precision of the recurrent ones, whatever those outside a layer have.

    torch has one setting for the process. Meanwhile, a product of another Python thread may follow this one, and torch
    does not tell it what ``allow_tf32`` is. A setting that is the general one is taken to follow that.
    """
    if precision == "native":
        yield
        return
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


def _strided(a: Any) -> Any:
    """(T, B, N) as it is, unless the kernels cannot address it: within a tile of rows offsets have 32 bits."""
    if a is None or (a.stride(-1) == 1 and a.stride(1) < 2**25):
        return _aligned(a)
    return _contiguous(a)


def _in_rows(a: Any) -> Any:
    """(T, B, H) as it is, if its strides are multiples of H, which makes loads wide."""
    return _strided(a if a is None or (a.stride(0) % a.shape[2] == a.stride(1) % a.shape[2] == 0) else a.contiguous())


def _contiguous(a: Any) -> Any:
    return a if a is None else _aligned(a.contiguous())


def _aligned(a: Any) -> Any:
    """Triton compiles a kernel again for a pointer of another alignment, as a row of the states of many layers has."""
    return a if a is None or a.data_ptr() % 16 == 0 else a.clone(memory_format=torch.preserve_format)


def _prepared(layer: Layer) -> Layer:
    """The layer as the kernels can address it, with states. Those of zeros stay one tensor."""
    x, weights, states, lengths, reset, reverse, cell, inputs = layer
    x = _strided(x.flatten(1, 2) if x.dim() == 4 else x)
    if states[0] is None:
        states = (x.new_zeros(x.shape[1], base.hidden_size(layer)),) * len(states)
    else:
        known: dict[int, Any] = {}
        states = tuple([known.setdefault(id(a), _contiguous(a)) for a in states])
    weights, inputs = tuple([_contiguous(a) for a in weights]), tuple([_contiguous(a) for a in inputs])
    return Layer(x, weights, states, _contiguous(lengths), _contiguous(reset), reverse, cell, inputs)


def plan(
    layer: Layer, save: bool, kept: dict[Any, Any] | None, ends: tuple[int, ...], precision: str | None = None
) -> base.Plan:
    """A plan for calls like that of `layer`. It keeps no weights, so `kept` stays as it is. `ends` are leading axes of
    the states.
    """
    from fastlstm.backends.triton import plans

    return plans.Plan(layer, save, ends, precision)


def forward(
    layer: Layer, save: bool, precision: str | None = None, start: Start | None = None, axes: tuple[int, ...] = ()
) -> Run:
    """See `fastlstm.backends.reference.forward`, and `launch.forward` for `start` and `axes`."""
    from fastlstm.backends.triton import launch

    precision = resolve_precision(layer.x.dtype, precision)
    with _products(precision):
        return launch.forward(_prepared(layer), save, precision, start or launch.start_anew, axes)


def backward(
    grads: Run, layer: Layer, run: Run, needs: Gradients, precision: str | None = None, start: Start | None = None
) -> Gradients:
    """See `fastlstm.backends.reference.backward`, and `launch.forward` for `start`."""
    from fastlstm.backends.triton import launch

    zeros = layer.states[0] is None
    layer, layout, weights = _prepared(layer), layer.cell.layout, layer.weights
    precision = resolve_precision(layer.x.dtype, precision)
    grads = Run(_in_rows(grads.h), tuple(map(_contiguous, grads.last)), tuple(map(_contiguous, grads.kept)))
    run = Run(_contiguous(run.h), (), tuple(map(_contiguous, run.kept)))
    found = launch.backward(grads, layer, run, needs, precision, start or launch.start_anew)
    with _products(precision):
        products = sums.Sums(layer.cell, (weights[0] if needs.x else None, None, None, None), base.hidden_size(layer))
        dx, dweight_ih, dweight_hh, dbias = products.to_x(found.sums) if needs.x else None, None, None, None
        if needs.x and dx is None:
            dx = torch.zeros_like(layer.x)  # a cell may multiply no x
        if needs.weights[0]:
            held = base.held_steps(layer)  # zero times the NaN of a padding would be NaN
            seen = layer.x if held is None else layer.x.masked_fill(held, 0)
            dweight_ih = sums.weight_gradient(products.of_x(found.sums), seen, weights[0])
            dweight_ih = sums.in_order(dweight_ih, sums.inverse(layout.blocks_ih), -2)
        if needs.weights[1]:
            dweight_hh = _recurrent_gradient(products.of_h(found.sums), layer, run.h, zeros)
            dweight_hh = sums.in_order(dweight_hh, sums.inverse(layout.blocks_hh), -2)
        given = next((bias for bias in weights[2:WEIGHTS] if bias is not None), None)
        if base.wants_bias(needs) and given is not None:
            dbias = sums.vector_gradient(found.sums, given)
        dbiases = products.bias_gradients(dbias, needs.weights[2:WEIGHTS], weights[2:WEIGHTS])
    dparams = (
        None if terms is None else sums.vector_gradient(terms.unsqueeze(0), param).to(param.dtype)
        for terms, param in zip(found.params, weights[WEIGHTS:])
    )
    dstates = tuple(a if need else None for a, need in zip(found.states, needs.states))
    return Gradients(dx, (dweight_ih, dweight_hh, *dbiases, *dparams), dstates, found.inputs)


def _recurrent_gradient(dpreact: Tensor, layer: Layer, h: Any, zeros: bool) -> Tensor:
    """dweight_hh. Each step saw h of the step before it, and a row's first step saw h_0. `zeros`: h_0 is not given.

    Held steps add nothing, since there dpreact and h are zero.
    """
    weight_hh, h_0, lengths, reset = cast(Any, (layer.weights[1], layer.states[0], layer.lengths, layer.reset))
    first, rest, seen = (-1, slice(0, -1), slice(1, None)) if layer.reverse else (0, slice(1, None), slice(0, -1))
    if zeros:
        h = h[seen] if reset is None else h[seen].masked_fill(reset[rest].unsqueeze(-1), 0)
        return sums.weight_gradient(dpreact[rest], h, weight_hh) if len(h) else torch.zeros_like(weight_hh)
    h, h_0, start = h[seen], h_0.view(1, *h.shape[1:]), dpreact[first].unsqueeze(0)
    unseen = None if reset is None else reset[first].view(1, -1, 1)
    if lengths is not None:
        h_0 = h_0.masked_fill((lengths <= 0).unsqueeze(-1), 0)  # zero times infinity would be NaN
        if layer.reverse:
            starts = (lengths.clamp(1, dpreact.shape[0]) - 1).view(1, -1, 1)
            start = dpreact.gather(0, starts.expand_as(start))
            unseen = None if reset is None else reset.unsqueeze(-1).gather(0, starts)
    if reset is not None:
        h, h_0 = h.masked_fill(reset[rest].unsqueeze(-1), 0), h_0.masked_fill(unseen, 0)
    start = sums.weight_gradient(start, h_0, weight_hh)
    return sums.weight_gradient(dpreact[rest], h, weight_hh, start) if h.shape[0] else start
