"""LSTMs and GRUs on the CPU: the kernels of csrc/, compiled when the package was installed and called through ctypes.

They have the tiles and loops of the numba backend, but need no compiler at run time and no time at the first call.
Layers of int8 weights, see `fastlstm.int8.definition`, run only without gradients.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from fastlstm.backends import base, csrc
from fastlstm.backends.base import Gradients, Layer, Run, Traits, stack_size_of
from fastlstm.backends.cpu import LARGE, threads_now
from fastlstm.backends.memory import address, rows_contiguous, snapshot_of
from fastlstm.backends.pool import pooled, unpooled
from fastlstm.cells.spec import Cell

TRAITS = Traits(plans=True, prepares_steps=True, cells=tuple(cell.key for cell in csrc.CELLS))
# enum fastlstm_dtype of csrc/fastlstm.h, by the type of the weights, or by the bits of x and h beside int8 weights
_DTYPES: dict[Any, int] = {torch.float32: 0, torch.float64: 1, 8: 2, 16: 3}
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the backend cannot run these tensors, or None. 16-bit tensors are computed in float32."""
    if device.type not in ("cpu", "meta"):
        return f"the native backend needs CPU tensors, got {device.type}"
    if dtype not in _DTYPES and dtype not in _SIXTEEN_BITS:
        return f"the native backend needs float32, float64, bfloat16 or float16, got {dtype}"
    return csrc.reason


def saved_shape(
    cell: Cell, T: int, B: int, H: int, dtype: torch.dtype, stack_size: int | None = None
) -> tuple[int, ...]:
    """Return the shape of the four saved gates of either cell. Each panel of units has its rows side by side."""
    lanes = int(csrc.library.fastlstm_lanes(_DTYPES[dtype], csrc.instructions))
    return T, -(-H // lanes), B, 4 * lanes


def _readable(layer: Layer) -> Layer:
    """Return the layer with contiguous tensors, and x with contiguous rows."""
    x, weights, states, lengths, reset, reverse, cell, _, scales, activations, *_ = layer
    weights, states, scales, (lengths, reset) = (
        tuple([a if a is None else a.contiguous() for a in each])
        for each in (weights, states, scales, (lengths, reset))
    )
    return Layer(rows_contiguous(x), weights, states, lengths, reset, reverse, cell, (), scales, activations)


def _sizes(layer: Layer) -> tuple[int, int, int, int]:
    """Return T, B, I and H. x may also be (B, I), a single step."""
    T, B, I = (1, *layer.x.shape)[-3:]
    return T, B, I, cast(Tensor, layer.weights[1]).shape[-1]


@lru_cache(64)
def _state(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return an example of states, which plans of the same number of rows share."""
    return torch.empty(shape, dtype=dtype, device="cpu")


class _Plan:
    """Runs calls like that of `layer`, no stack: of the same shapes, types, strides of x, contiguity and threads. A
    layer's plans share `packed_weights`; with None each call packs. `state_axes` are the leading axes of the states.
    """

    backend: str  # set by `fastlstm.call`
    types: Any  # of saved tensors: set and read by `fastlstm.autograd.layer_function`
    reads_h = True  # whether backward needs h: read by `fastlstm.autograd.layer_function`
    accumulates = False
    known: dict[Any, Any]
    loop: Any

    def __init__(
        self, layer: Layer, save: bool, packed_weights: dict[Any, Any] | None, state_axes: tuple[int, ...]
    ) -> None:
        readable, activations = _readable(layer), layer.activations
        self.is_readable = all(map(is_, layer.tensors + layer.scales, readable.tensors + readable.scales))
        x, sizes = readable.x, _sizes(layer)
        T, B, self.I, self.H = sizes
        self.output, self.state = None if x.dim() == 2 else (T, B, self.H), _state(x.dtype, *state_axes, B, self.H)
        self.has_c, self.saves_sequences = len(layer.cell.states) == 2, x.dim() == 3
        saved = [(unpooled, (T, B, self.H))] * self.has_c + [(pooled, saved_shape(layer.cell, T, B, self.H, x.dtype))]
        self.saved = saved if save else []  # the allocators and shapes of c and the gates
        self.pack_key = _DTYPES[activations or x.dtype], csrc.instructions, csrc.CELLS[layer.cell], self.I, self.H
        self.head, self.x_strides = (csrc.VERSION, *self.pack_key[:3], *sizes, layer.reverse), csrc.array(x, 2)[1:]
        self.key = "native", layer.reverse, *self.pack_key[activations > 0 :]  # both int8 types pack alike
        self.is_empty, self.threads = B == 0, csrc.threads_argument(threads_now())
        # Calls that keep no packed weights: training on whole sequences, and single steps of large weights, see LARGE.
        packs_in_each_call = save if T > 1 else sum(cast(Tensor, a).nbytes for a in layer.weights[:2]) > LARGE
        self.packed_weights = None if (packs_in_each_call and not activations) or self.is_empty else packed_weights

    def forward(self, layer: Layer) -> Run:
        """Return the results. Weights that differ from the packed ones are packed again first."""
        if not self.is_readable:
            layer = _readable(layer)
        x = layer.x
        h = None if self.output is None else unpooled(x, *self.output)
        last = torch.empty_like(self.state), torch.empty_like(self.state)  # faster than new_empty
        run = Run(h, last if self.has_c else last[:1], tuple([allocate(x, *shape) for allocate, shape in self.saved]))
        if self.packed_weights is not None:
            packed = self.packed_weights.get(self.key)
            if packed is None or not self._run(layer, run, packed, True):
                self._run(layer, run, self.pack(layer, self.packed_weights), False)
        elif not self.is_empty:
            self._run(layer, run, None, False)
        return run

    def pack(self, layer: Layer, packed_weights: dict[Any, Any]) -> Tensor:
        """Pack a snapshot of the weights and keep it. Nobody writes to it again, since other threads may read it."""
        weights = cast(list[Any], snapshot_of((*layer.weights, *layer.scales)))
        packed = unpooled(weights[0], csrc.library.fastlstm_packed_size(*self.pack_key) // weights[0].itemsize)
        csrc.call("fastlstm_pack", self.arguments_of(weights), packed.data_ptr())
        packed_weights[self.key] = packed
        return packed

    def arguments_of(self, weights: Sequence[Any]) -> bytes:
        """Return the arguments of a call that reads nothing but weights, biases and scales."""
        weight_ih, weight_hh, *others = weights
        fields = *self.head, *csrc.array(None, 2), *csrc.array(weight_ih, 1), *csrc.array(weight_hh, 1)
        fields += tuple(map(address, others))
        return csrc.FORWARD.pack(*fields, *(0,) * (csrc.FORWARD_FIELDS - len(fields)))

    def _run(self, layer: Layer, run: Run, packed: Tensor | None, watch: bool) -> bool:
        """Write the results to `run`. Return False if `watch` is set and the weights are not those of `packed`."""
        x, (weight_ih, weight_hh, bias_ih, bias_hh), (h_0, *c_0), lengths, reset, *_ = cast(Any, layer)
        h, (h_n, *c_n), saved = cast(Any, run)
        scale_ih, scale_hh = map(address, layer.scales) if layer.activations else (0, 0)
        changed = ctypes.c_int64() if watch else None
        # The conditions are spelled out, since calls of `address` would take longer.
        arguments = csrc.FORWARD.pack(
            *self.head, x.data_ptr(), *self.x_strides, weight_ih.data_ptr(), self.I, weight_hh.data_ptr(), self.H,
            0 if bias_ih is None else bias_ih.data_ptr(), 0 if bias_hh is None else bias_hh.data_ptr(),
            scale_ih, scale_hh, 0 if packed is None else packed.data_ptr(),
            0 if changed is None else ctypes.addressof(changed),
            0 if h_0 is None else h_0.data_ptr(), self.H, address(c_0[0]) if c_0 else 0, self.H,
            0 if reset is None else reset.data_ptr(), 0 if lengths is None else lengths.data_ptr(),
            0 if h is None else h.data_ptr(), h_n.data_ptr(), c_n[0].data_ptr() if c_n else 0,
            saved[0].data_ptr() if len(saved) == 2 else 0, saved[-1].data_ptr() if saved else 0,
        )  # fmt: skip
        csrc.call("fastlstm_forward", arguments, self.threads)
        return changed is None or changed.value == 0

    def backward(self, grads: Run, layer: Layer, run: Run, needs: Gradients, form: list[Any]) -> Gradients:
        # Hooks of saved tensors may give them back in another layout.
        return _backward(self.head[:4], grads, _readable(layer), run, needs)


plan: Callable[..., base.Plan] = _Plan


def forward(layer: Layer, save: bool) -> Run:
    """Return the results of one call, which packs the weights. The layers of a stack run one after the other. Raise
    RuntimeError without memory, and for I or H of an int8 layer above 65536.
    """
    if not stack_size_of(layer):
        return _Plan(layer, save, None, ()).forward(layer)
    runs = [forward(each, save) for each in _layers(layer)]
    columns = [_joined(column) for column in zip(*(run.flat for run in runs))]
    return Run.of(len(layer.states), columns)


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients) -> Gradients:
    """Return the gradients of one call, from the gradients of its results."""
    if stack_size_of(layer):
        layers = _layers(layer)
        parts = zip(_runs(grads, len(layers)), layers, _runs(run, len(layers)))
        dx, *others = zip(*(backward(*part, needs).flat for part in parts))
        weights = (None if column[0] is None else torch.stack(column) for column in others[:4])
        return Gradients(_joined(dx), tuple(weights), tuple(map(_joined, others[4:])))
    kind = csrc.VERSION, _DTYPES[layer.x.dtype], csrc.instructions, csrc.CELLS[layer.cell]
    return _backward(kind, grads, _readable(layer), run, needs)


def _backward(kind: tuple[int, ...], grads: Run, layer: Layer, run: Run, needs: Gradients) -> Gradients:
    """Return the gradients of a `_readable` layer. `kind`: version, type, instructions and cell of its run."""
    x, weights, states, lengths, reset, reverse, *_ = layer
    T, B, I, H = _sizes(layer)
    shapes = [None if a is None else a.shape for a in (x, *weights)]
    shapes += [(B, H) if a is None else a.shape for a in states]
    gradients = [None if shape is None or not want else unpooled(x, *shape) for shape, want in zip(shapes, needs.flat)]
    dx, dweights, dstates = gradients[0], gradients[1:5], gradients[5:]
    if B:
        (h_0, c_0), (dh_n, dc_n), (dh_0, dc_0) = (csrc.with_c(each) for each in (states, grads.last, dstates))
        with_c = run.saved if len(run.saved) == 2 else (None, *run.saved)
        saved = [a if a is None else a.contiguous() for a in (run.h, *with_c)]
        incoming = grads.h, dh_n, dc_n, *(grads.saved or (None,))
        dh, dh_n, dc_n, dc = (a if a is None else rows_contiguous(a) for a in incoming)
        arguments = csrc.BACKWARD.pack(
            *kind, T, B, I, H, reverse, *csrc.array(x, 2), address(weights[0]), I, address(weights[1]), H, address(h_0),
            H, address(c_0), H, address(reset), address(lengths), *map(address, saved), *csrc.array(dh, 2),
            *csrc.array(dc, 2), *csrc.array(dh_n, 1), *csrc.array(dc_n, 1), address(dx), *map(address, dweights),
            address(dh_0), address(dc_0),
        )  # fmt: skip
        csrc.call("fastlstm_backward", arguments, csrc.threads_argument(threads_now()))
    else:
        gradients = [a if a is None else a.zero_() for a in gradients]
    return Gradients(dx, tuple(dweights), tuple(dstates))


def _shares(a: Tensor | None, stack_size: int, axis: int = -2) -> Sequence[Tensor | None]:
    """Return the equal shares of the batch rows along `axis` that the layers of a stack have."""
    return [None] * stack_size if a is None else a.chunk(stack_size, axis)


def _layers(layer: Layer) -> list[Layer]:
    """Return the layers of a stack."""
    x, weights, states, lengths, reset, reverse, *_ = layer
    stack_size = stack_size_of(layer)
    columns = (
        x.unbind(1) if x.dim() == 4 else _shares(x, stack_size),
        *([None] * stack_size if a is None else a.unbind(0) for a in weights),
        *(_shares(a, stack_size) for a in states),
        *(_shares(a, stack_size, -1) for a in (lengths, reset)),
    )
    return [Layer.of(layer.cell, row, reverse) for row in zip(*columns)]


def _runs(run: Run, stack_size: int) -> list[Run]:
    rows = zip(*(_shares(a, stack_size) for a in run.flat))
    return [Run.of(len(run.last), row) for row in rows]


def _joined(column: tuple[Any, ...]) -> Tensor | None:
    return None if column[0] is None else torch.cat(column, -2)


def steps(layer: Layer, packed_weights: dict[Any, Any]) -> csrc.Steps:
    """Prepare the steps of a layer of float32, float64 or int8, whose weights do not change: x (B, I) and states (B,
    H), contiguous, which the steps read and write. Steps have packed weights of their own.
    """
    with torch.inference_mode(False), torch.no_grad():
        plan, readable = _Plan(layer, False, None, ()), _readable(layer)
        return csrc.Steps(plan.arguments_of((*readable.weights, *readable.scales)), plan.threads, layer.states)
