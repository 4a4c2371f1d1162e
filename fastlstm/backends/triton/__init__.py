"""LSTM layers on NVIDIA GPUs: Triton kernels compiled when first used.

`tiles` chooses between one launch for all time steps (`resident`) and one launch a step (`stepwise`). The gradients of
the weights, the bias and the input are products over all steps at once and go to torch. Under ``TRITON_INTERPRET=1``
the same kernels run on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends import reference
from fastlstm.backends.base import Traits

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")  # as triton reads it
TRAITS = Traits(takes_sixteen_bits=True)
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


def saved_shape(T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Shape of the gates kept for the backward pass."""
    return T, B, 4 * H


def with_precision(precision: str) -> SimpleNamespace:
    """This backend with "ieee" or "tf32" products in float32, whatever torch's setting says."""
    functions = {function.__name__: partial(function, precision=precision) for function in (forward, backward)}
    return SimpleNamespace(supports=supports, saved_shape=saved_shape, TRAITS=TRAITS, **functions)


def resolve_precision(dtype: torch.dtype, precision: str | None) -> str:
    """How products are done: "native" in 16 bits; in float32 "ieee" or "tf32", None following torch as nn.LSTM does."""
    if dtype != torch.float32:
        return "native"
    if precision is None:
        rnn: Any = torch.backends.cudnn.rnn
        precision = rnn.fp32_precision  # cudnn.allow_tf32 sets it too
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
    return _aligned(a if a is None or (a.stride(-1) == 1 and a.stride(1) < 2**25) else a.contiguous())


def _contiguous(a: Any) -> Any:
    return _aligned(a if a is None else a.contiguous())


def _aligned(a: Any) -> Any:
    """Triton compiles a kernel again for a pointer of another alignment, as a row of the states of many layers has."""
    return a if a is None or a.data_ptr() % 16 == 0 else a.clone(memory_format=torch.preserve_format)


def forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    save: bool,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastlstm.backends.reference.forward`."""
    from fastlstm.backends.triton import launch

    (T, B), H = x.shape[:2], weight_hh.shape[-1]
    h, h_n, c_n = x.new_empty(T, B, H), x.new_empty(B, H), x.new_empty(B, H)
    c, gates = (x.new_empty(T, B, H), x.new_empty(T, B, 4 * H)) if save else (None, None)
    if B:
        same = c_0 is h_0  # zeros
        weight_ih, weight_hh, h_0, bias, mask = map(_contiguous, (weight_ih, weight_hh, h_0, bias, mask))
        c_0 = h_0 if same else _contiguous(c_0)
        precision = resolve_precision(x.dtype, precision)
        with _products(precision):
            launch.forward(
                _strided(x), weight_ih, weight_hh, bias, h_0, c_0, mask, reverse, precision, h, c, gates, h_n, c_n
            )
    return h, h_n, c_n, x.new_empty(0) if c is None else c, x.new_empty(0) if gates is None else gates


def backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    mask: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    reverse: bool,
    needs: list[bool],
    precision: str | None = None,
) -> tuple[Tensor | None, ...]:
    """See `fastlstm.backends.reference.backward`."""
    from fastlstm.backends.triton import launch

    precision = resolve_precision(x.dtype, precision)
    if x.shape[1]:
        weight_hh, c_0, mask, c, gates, dh_n, dc_n = map(_contiguous, (weight_hh, c_0, mask, c, gates, dh_n, dc_n))
        dh, dc = _strided(dh), _strided(dc)
        dpreact, dh_0, dc_0 = launch.backward(dh, dh_n, dc_n, dc, weight_hh, c_0, mask, c, gates, reverse, precision)
    else:
        dpreact, dh_0, dc_0 = gates, h_0.clone(), c_0.clone()
    seen = x
    if mask is not None:  # zero times the NaN of a padding would be NaN
        seen = x.masked_fill((mask == reference.HOLD).unsqueeze(-1), 0)
    with _products(precision):
        return (
            reference.linear(dpreact, weight_ih.mT) if needs[0] else None,
            reference.weight_gradient(dpreact, seen, weight_ih) if needs[1] else None,
            _recurrent_gradient(dpreact, weight_hh, h_0, h, mask, reverse) if needs[2] else None,
            reference.bias_gradient(dpreact, bias) if needs[3] and bias is not None else None,
            dh_0,
            dc_0,
        )


def _recurrent_gradient(
    dpreact: Tensor, weight_hh: Tensor, h_0: Tensor, h: Tensor, mask: Tensor | None, reverse: bool
) -> Tensor:
    """dweight_hh: the state each step saw is h one step before it, and h_0 for the first."""
    first, rest, seen = (-1, slice(0, -1), slice(1, None)) if reverse else (0, slice(1, None), slice(0, -1))
    h, h_0 = h[seen], h_0.unsqueeze(0)
    if mask is not None:
        unseen = (mask != 0).unsqueeze(-1)  # a reset step saw zeros, a held one's dpreact is zero
        h, h_0 = h.masked_fill(unseen[rest], 0), h_0.masked_fill(unseen[first], 0)
    start = reference.weight_gradient(dpreact[first].unsqueeze(0), h_0, weight_hh)
    return reference.weight_gradient(dpreact[rest], h, weight_hh, start) if h.shape[0] else start
