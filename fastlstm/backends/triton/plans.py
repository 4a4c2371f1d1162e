"""Plans for calls of one signature, which keep a pass for each precision, and gradients that come in or are wanted."""

from __future__ import annotations

from typing import Any

import torch

from fastlstm.backends.base import Gradients, Layer, Run
from fastlstm.backends.triton.backward_pass import Backward
from fastlstm.backends.triton.device import resolve_precision
from fastlstm.backends.triton.launch import Forward


class Plan:
    """How calls like an example run. See `fastlstm.backends.base.Plan`."""

    backend: str
    types: Any
    reads_h = True
    known: dict[Any, Any]

    def __init__(self, layer: Layer, save: bool, state_axes: tuple[int, ...], precision: str | None) -> None:
        """See `plan`."""
        self.save, self.state_axes, self.precision, self.dtype = save, state_axes, precision, layer.x.dtype
        self.step = layer.x.dim() == 2
        self.casts = any(a is not None and a.dtype is not self.dtype for a in layer.weights)
        self.saves_sequences = not self.step and self.dtype is torch.float32
        self.passes: dict[Any, Any] = {}

    def forward(self, layer: Layer) -> Run:
        precision = resolve_precision(self.dtype, self.precision)
        if self.step or self.casts:
            layer = self._normalized(layer)
        forward = self.passes.get(precision)
        if forward is None:
            forward = self.passes.setdefault(precision, Forward(layer, self.save, precision, self.state_axes))
        run: Run = forward.run(layer)
        if not self.step:
            return run
        return run._replace(h=None, saved=(*run.saved, run.h) if self.save else ())  # some cells read h after the step

    def backward(self, grads: Run, layer: Layer, run: Run, needs: Gradients, form: list[Any]) -> Gradients:
        x, precision = layer.x, resolve_precision(self.dtype, self.precision)
        if self.step:
            layer, (*saved, h) = self._normalized(layer), run.saved
            run = run._replace(h=h, saved=tuple(saved))
        key = precision, needs, *[a is None for a in (grads.h, *grads.last, *grads.saved)]
        backward = self.passes.get(key)
        if backward is None:
            backward = self.passes.setdefault(key, Backward(layer, needs, precision))
        gradients: Gradients = backward.run(grads, layer, run)
        return gradients._replace(x=gradients.x.view_as(x)) if self.step and gradients.x is not None else gradients

    def _normalized(self, layer: Layer) -> Layer:
        """Return the layer with x of (T, B, I), and weights of its type."""
        if self.step:
            layer = layer._replace(x=layer.x.unsqueeze(0))
        if self.casts:
            layer = layer._replace(weights=tuple(a if a is None else a.to(self.dtype) for a in layer.weights))
        return layer
