"""LSTM layers on the CPU: the kernels of csrc/, compiled when the package was installed, through ctypes.

The same tiles and loops as the numba backend's, for no time at the first call and no compiler at run time.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Traits
from fastlstm.backends.cpu import (
    LARGE,
    PackedWeights,
    address,
    address_of,
    openmp,
    rows_contiguous,
    snapshot_of,
    threads_now,
)
from fastlstm.backends.memory import pooled, unpooled
from fastlstm.backends.reference import HOLD

LIBRARY = Path(__file__).parents[1] / ("_native.dll" if os.name == "nt" else "_native.so")
VERSION = 3  # FASTLSTM_VERSION of csrc/fastlstm.h, whose structures these are, field by field
FORWARD = struct.Struct("@8q Pqq Pq Pq PPPP Pq Pq P PPP PP")
BACKWARD = struct.Struct("@8q Pqq Pq Pq Pq Pq P PPP Pqq Pqq Pq Pq PPPP PP")
THREADS = struct.Struct("@qPP")

TRAITS = Traits(keeps_weights=True, keeps_steps=True)
_DTYPES = {torch.float32: 0, torch.float64: 1}
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_instructions = 0  # enum fastlstm_instructions; 0 is the processor's widest


def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return (
            f"the native backend needs {LIBRARY.name}, which is built when fastlstm is installed and a GCC or Clang is "
            "there: this installation has none"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the native backend's {LIBRARY.name} cannot be loaded: {error}"
    if library.fastlstm_version() != VERSION:
        return f"the native backend's {LIBRARY.name} is of another version: install fastlstm again"
    for function in (library.fastlstm_forward, library.fastlstm_backward):
        function.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    library.fastlstm_pack.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    library.fastlstm_packed_size.argtypes = [ctypes.c_int64] * 4
    library.fastlstm_packed_size.restype = ctypes.c_size_t
    library.fastlstm_lanes.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.fastlstm_lanes.restype = ctypes.c_int64
    library.fastlstm_error_text.restype = ctypes.c_char_p
    return library


_library: Any = _load()  # under a millisecond; tracers could not see through a later one
_reason = _library if isinstance(_library, str) else None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be taken, or None. 16-bit tensors are computed in float32."""
    if device.type not in ("cpu", "meta"):
        return f"the native backend needs CPU tensors, got {device.type}"
    if dtype not in _DTYPES and dtype not in _SIXTEEN_BITS:
        return f"the native backend needs float32, float64, bfloat16 or float16, got {dtype}"
    return _reason


@cache
def _lanes(dtype: torch.dtype, instructions: int) -> int:
    return _library.fastlstm_lanes(_DTYPES[dtype], instructions)


def saved_shape(T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Shape of the gates kept for the backward pass:
    for each panel of units its rows side by side, as both passes read them.
    """
    lanes = _lanes(dtype, _instructions)
    return T, -(-H // lanes), B, 4 * lanes


@cache
def _openmp() -> Any:
    """A fastlstm_openmp of torch's libgomp, or None."""
    found = openmp()
    return None if found is None else (ctypes.c_void_p * 3)(address_of(found[0]), *found[1:])


@cache
def _team(count: int) -> bytes:
    functions = _openmp()
    if functions is None:  # the library has a pool of its own
        return THREADS.pack(count, 0, 0)
    return THREADS.pack(count, address_of(_library.fastlstm_parallel_openmp), ctypes.addressof(functions))


def _call(name: str, arguments: bytes, other: Any) -> None:
    code = getattr(_library, name)(arguments, other)
    if code:
        raise RuntimeError(f"{name}: {_library.fastlstm_error_text(code).decode()}")


def _array(a: Tensor | None, leading: int) -> tuple[int, ...]:
    """The address of `a` and its `leading` strides, all zero where there is none."""
    return (0,) * (leading + 1) if a is None else (a.data_ptr(), *a.stride()[:leading])


def _weight(a: Tensor) -> Tensor:
    """`a` with rows that do not overlap, as those of an expanded tensor do."""
    return a if a.stride(-1) == 1 and a.stride(-2) >= a.shape[-1] else a.contiguous()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastlstm.backends.reference.forward`; the gates have `saved_shape`."""
    if weight_ih.dim() == 3:
        return _stacked_forward(x, weight_ih, weight_hh, bias, h_0, c_0, mask, reverse, save)
    (T, B, I), H = x.shape, weight_hh.shape[-1]
    h, h_n, c_n = unpooled(x, T, B, H), x.new_empty(B, H), x.new_empty(B, H)
    c = unpooled(x, T, B, H) if save else x.new_empty(0)
    gates = pooled(x, *saved_shape(T, B, H, x.dtype)) if save else x.new_empty(0)
    if B == 0:
        return h, h_n, c_n, c, gates
    x, h_0, c_0 = (rows_contiguous(a) for a in (x, h_0, c_0))
    weight_ih, weight_hh = _weight(weight_ih), _weight(weight_hh)
    bias = bias if bias is None else bias.contiguous()
    mask = mask if mask is None else mask.to(torch.int32).contiguous()
    arguments = FORWARD.pack(
        VERSION, _DTYPES[x.dtype], _instructions, T, B, I, H, reverse,
        *_array(x, 2), *_array(weight_ih, 1), *_array(weight_hh, 1), address(bias), 0, 0, 0,
        *_array(h_0, 1), *_array(c_0, 1), address(mask), h.data_ptr(), h_n.data_ptr(), c_n.data_ptr(),
        c.data_ptr() if save else 0, gates.data_ptr() if save else 0,
    )  # fmt: skip
    _call("fastlstm_forward", arguments, _team(threads_now()))
    return h, h_n, c_n, c, gates


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
    packed: Any = None,
) -> tuple[Tensor | None, ...]:
    """See `fastlstm.backends.reference.backward`. `packed` does not serve here."""
    if weight_ih.dim() == 3:
        return _stacked_backward(
            dh, dh_n, dc_n, dc, x, weight_ih, weight_hh, bias, h_0, c_0, mask, h, c, gates, reverse, needs
        )
    (T, B, I), H = x.shape, weight_hh.shape[-1]
    wanted = (*needs[:3], needs[3] and bias is not None, *needs[4:])
    shapes = ((T, B, I), (4 * H, I), (4 * H, H), (4 * H,), (B, H), (B, H))
    gradients = [unpooled(x, *shape) if want else None for shape, want in zip(shapes, wanted)]
    if B == 0:
        return tuple(a if a is None else a.zero_() for a in gradients)
    x, h_0, c_0 = (rows_contiguous(a) for a in (x, h_0, c_0))
    weight_ih, weight_hh = _weight(weight_ih), _weight(weight_hh)
    h, c, gates = h.contiguous(), c.contiguous(), gates.contiguous()
    dh, dh_n, dc_n, dc = (a if a is None else rows_contiguous(a) for a in (dh, dh_n, dc_n, dc))
    mask = mask if mask is None else mask.to(torch.int32).contiguous()
    arguments = BACKWARD.pack(
        VERSION, _DTYPES[x.dtype], _instructions, T, B, I, H, reverse,
        *_array(x, 2), *_array(weight_ih, 1), *_array(weight_hh, 1), *_array(h_0, 1), *_array(c_0, 1), address(mask),
        h.data_ptr(), c.data_ptr(), gates.data_ptr(), *_array(dh, 2), *_array(dc, 2), *_array(dh_n, 1),
        *_array(dc_n, 1), *(address(g) for g in gradients),
    )  # fmt: skip
    _call("fastlstm_backward", arguments, _team(threads_now()))
    return tuple(gradients)


class PackedLayer(PackedWeights):
    """See `PackedWeights`."""

    backend = "native"

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        super().__init__(weights)
        I, H, snapshot = self.I, self.H, snapshot_of(weights)
        self.kind = VERSION, _DTYPES[self.dtype], _instructions
        size = _library.fastlstm_packed_size(*self.kind[1:], I, H)
        self.packed = unpooled(self.weight_ih, size // self.dtype.itemsize)
        self.large = 4 * H * (I + H) * self.dtype.itemsize > LARGE
        self.addresses, read = _addresses(weights), _addresses(snapshot)
        arguments = FORWARD.pack(*self.kind, 0, 0, I, H, 0, *_array(None, 2), *read, *(0,) * 12)
        _call("fastlstm_pack", arguments, self.packed.data_ptr())

    def forward(
        self,
        x: Tensor,
        hx: tuple[Tensor, Tensor] | None,
        reverse: bool,
        save: bool = False,
        *,
        mask: Tensor | None = None,
        hides: bool = False,
        out: Tensor | None = None,
        layer_axis: bool = False,
    ) -> tuple[Tensor, ...] | None:
        """As `PackedWeights.forward`; with `save` also ``c`` (T, B, H) and the gates."""
        (T, B, I), H = x.shape, self.H
        states = (1, B, H) if layer_axis else (B, H)
        h, h_n, c_n = x.new_empty(T, B, H), x.new_empty(*states), x.new_empty(*states)
        saved: tuple[Tensor, ...] = ()
        if save:
            saved = unpooled(x, T, B, H), pooled(x, *saved_shape(T, B, H, x.dtype))
        if B == 0:
            return h, h_n, c_n, *saved
        x = rows_contiguous(x)
        h_0, c_0 = (None, None) if hx is None else (rows_contiguous(state) for state in hx)
        mask = mask if mask is None else mask.to(torch.int32).contiguous()
        changed = ctypes.c_int64()
        kept = (0, 0) if self.large and T == 1 else (self.packed.data_ptr(), ctypes.addressof(changed))
        arguments = FORWARD.pack(
            *self.kind, T, B, I, H, reverse, *_array(x, 2), *self.addresses, *kept,
            *_array(h_0, 1), *_array(c_0, 1), address(mask), h.data_ptr(), h_n.data_ptr(), c_n.data_ptr(),
            *((a.data_ptr() for a in saved) if save else (0, 0)),
        )  # fmt: skip
        _call("fastlstm_forward", arguments, _team(threads_now()))
        self.stale = self.stale or changed.value != 0
        if hides and mask is not None:
            h.masked_fill_((mask == HOLD).unsqueeze(-1), 0)
        return None if changed.value else (h, h_n, c_n, *saved)


def _addresses(weights: Sequence[Tensor | None]) -> tuple[int, ...]:
    weight_ih, weight_hh, *biases = weights
    return *_array(weight_ih, 1), *_array(weight_hh, 1), *map(address, biases)


def pack(weights: Sequence[Tensor | None], *originals: Sequence[Tensor | None]) -> PackedLayer:
    """Packed weights of weight_ih, weight_hh, bias_ih, bias_hh; whose copies they are is for the caller to look at."""
    return PackedLayer(weights)


def _group(a: Tensor | None, axis: int, g: int, groups: int) -> Any:
    return None if a is None else a.unflatten(axis, (groups, -1)).select(axis, g)


def _stacked_forward(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, h_0: Tensor, c_0: Tensor, mask: Tensor | None,
    reverse: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A stack of layers, each with its group of batch rows."""
    G = weight_ih.shape[0]
    results = [
        forward(
            _group(x, 1, g, G), weight_ih[g], weight_hh[g], None if bias is None else bias[g], _group(h_0, 0, g, G),
            _group(c_0, 0, g, G), _group(mask, 1, g, G), reverse, save,
        )
        for g in range(G)
    ]  # fmt: skip
    h, h_n, c_n, c, gates = zip(*results)
    if save:
        return torch.cat(h, 1), torch.cat(h_n), torch.cat(c_n), torch.cat(c, 1), torch.cat(gates, 2)
    return torch.cat(h, 1), torch.cat(h_n), torch.cat(c_n), c[0], gates[0]


def _stacked_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The gradients of a stack of layers."""
    dh, dh_n, dc_n, dc, x, weight_ih, weight_hh, bias, h_0, c_0, mask, h, c, gates, reverse, needs = args
    G = weight_ih.shape[0]
    results = [
        backward(
            _group(dh, 1, g, G), _group(dh_n, 0, g, G), _group(dc_n, 0, g, G), _group(dc, 1, g, G), _group(x, 1, g, G),
            weight_ih[g], weight_hh[g], None if bias is None else bias[g], _group(h_0, 0, g, G), _group(c_0, 0, g, G),
            _group(mask, 1, g, G), _group(h, 1, g, G), _group(c, 1, g, G), _group(gates, 2, g, G), reverse, needs,
        )
        for g in range(G)
    ]  # fmt: skip
    joins = (lambda a: torch.cat(a, 1), torch.stack, torch.stack, torch.stack, torch.cat, torch.cat)
    return tuple(None if column[0] is None else join(column) for join, column in zip(joins, zip(*results)))
