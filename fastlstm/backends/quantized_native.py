"""LSTMs and GRUs with int8 weights on the CPU: inference by the kernels of csrc/."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends import csrc
from fastlstm.backends.base import Layer, Run
from fastlstm.backends.cpu import address, rows_contiguous, snapshot_of, threads_now
from fastlstm.backends.memory import unpooled

_DTYPES = {8: 2, 16: 3}  # enum fastlstm_dtype of csrc/fastlstm.h, by the bits of x and h
_KEY = "native int8"


class Plan:
    """Runs the calls of one signature."""

    def __init__(self, layer: Layer, activations: int, kept: dict[Any, Any] | None, ends: tuple[int, ...]) -> None:
        T, B, I = layer.x.shape
        H = layer.weights[1].shape[1]
        cell, kind = csrc.CELLS[layer.cell], _DTYPES[activations]
        self.shape, self.state, self.kept, self.team = (T, B, H), (*ends, B, H), kept, csrc.team(threads_now())
        self.packs = kind, csrc.instructions, cell, I, H
        self.head = csrc.VERSION, *self.packs[:3], T, B, I, H, layer.reverse
        self.key = self.packs[1:]  # what packed weights depend on: not on the bits of x and h

    def forward(self, layer: Layer) -> Run:
        """Return the results. Weights that differ from the packed ones are packed again first."""
        h = unpooled(layer.x, *self.shape)
        run = Run(h, tuple(h.new_empty(self.state) for _ in layer.states), ())
        if self.shape[1] == 0:
            return run
        _, weights, states, lengths, reset, *_ = layer
        weights, states, (lengths, reset) = map(_contiguous, (weights, states, (lengths, reset)))
        layer = layer._replace(x=rows_contiguous(layer.x), weights=weights, states=states, lengths=lengths, reset=reset)
        if self.kept is None:
            self._run(layer, run, None, None)
            return run
        key, packed = self.kept.get(_KEY, (None, None))
        changed = ctypes.c_int64(1)
        if key == self.key:
            self._run(layer, run, packed, changed)
        if changed.value:
            self._run(layer, run, self.pack(weights, self.kept), None)
        return run

    def pack(self, weights: Sequence[Tensor | None], kept: dict[Any, Any]) -> Tensor:
        """Pack a snapshot of the weights and keep it. Nobody writes to it again, since other threads may read it."""
        weights = snapshot_of(weights)
        size = csrc.library.fastlstm_packed_size(*self.packs)
        packed = torch.empty(size, dtype=torch.int8, device="cpu")
        arguments = csrc.FORWARD.pack(*self.head, 0, 0, 0, *_fields(weights), *(0,) * 13)
        csrc.call("fastlstm_pack", arguments, packed.data_ptr())
        kept[_KEY] = self.key, packed
        return packed

    def _run(self, layer: Layer, run: Run, packed: Tensor | None, changed: ctypes.c_int64 | None) -> None:
        """Write the results to `run`, and to `changed` how many parts of `packed` are not the weights'."""
        (h_0, c_0), (h_n, c_n) = (csrc.with_c(states) for states in (layer.states, run.last))
        H = self.shape[2]
        arguments = csrc.FORWARD.pack(
            *self.head, *csrc.array(layer.x, 2), *_fields(layer.weights), address(packed),
            0 if changed is None else ctypes.addressof(changed), address(h_0), H, address(c_0), H,
            address(layer.reset), address(layer.lengths), address(run.h), address(h_n), address(c_n), 0, 0,
        )  # fmt: skip
        csrc.call("fastlstm_forward", arguments, self.team)


def _contiguous(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple(None if a is None else a.contiguous() for a in tensors)


def _fields(weights: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return the fields of fastlstm_forward_args from weight_ih to weight_hh_scale."""
    weight_ih, weight_hh, *others = weights
    return *csrc.array(weight_ih, 1), *csrc.array(weight_hh, 1), *map(address, others)


def quantized_plan(layer: Layer, activations: int, kept: dict[Any, Any] | None, ends: tuple[int, ...]) -> Plan:
    """Return a plan for calls like that of `layer`, with the same shapes and number of threads.

    Args:
        layer: an LSTM or a GRU with x (T, B, I), states and biases in float32. Its weights are weight_ih int8 (G H, I),
            weight_hh int8 (G H, H), bias_ih and bias_hh (G H,) or None, and float32 weight_ih_scale and
            weight_hh_scale (G H,). A weight row is its numbers, from -127 to 127, times its scale.
        activations: 8 or 16, the bits to which the kernels round x and h.
        kept: where all plans of a layer keep its packed weights, or None if each call packs its own.
        ends: leading axes of the states, and of those of the runs, before (B, H).
    """
    return Plan(layer, activations, kept, ends)


def quantized_forward(layer: Layer, activations: int) -> Run:
    """Return the results of one call, which packs the weights for itself, and whose states are (B, H).

    The arguments are those of `quantized_plan`.

    Raises:
        RuntimeError: if the library cannot run the call: I or H is above 65536, or no memory is left.
    """
    return quantized_plan(layer, activations, None, ()).forward(layer)


def quantized_steps(layer: Layer, activations: int, kept: dict[Any, Any]) -> csrc.Steps:
    """Prepare the steps of an int8 layer, whose x is (B, I). See `fastlstm.backends.native.steps`."""
    with torch.inference_mode(False), torch.no_grad():
        plan = Plan(layer._replace(x=layer.x.unsqueeze(0)), activations, {}, ())
        if _KEY not in kept:
            plan.pack(_contiguous(layer.weights), kept)
        return csrc.Steps(plan.packs, kept[_KEY][1], layer.states, plan.team)
