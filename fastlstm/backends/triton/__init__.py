"""Layers of any cell on NVIDIA GPUs: Triton kernels compiled when first used.

`tiles` chooses between one launch for all time steps (`resident`) and one launch a step (`stepwise`). The gradients of
the weights, the bias and the input are products over all steps at once and go to torch. Under ``TRITON_INTERPRET=1``
the same kernels run on CPU tensors. Functions here import the kernels at their first call, since those import triton.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from fastlstm.backends import base
from fastlstm.backends.base import Gradients, Layer, Run, Traits
from fastlstm.backends.reference import saved_shape
from fastlstm.backends.triton.device import resolve_precision, supports

TRAITS = Traits(takes_sixteen_bits=True, plans=True, plans_sixteen_bits=True, heads=True, products=True)


def check(layer: Layer, precision: str | None = None) -> str | None:
    """Return why no kernels run for a layer of supported tensors, or None. See `first_call` for what is checked."""
    if supports(layer.x.device, layer.x.dtype) is not None:
        return None
    from fastlstm.backends.triton import first_call, launch

    precision = resolve_precision(layer.x.dtype, precision)
    return launch.lacks(layer, precision) or first_call.failure(layer, precision)


def is_faster(layer: Layer, precision: str | None = None) -> bool:
    """Return whether the kernels count as faster than torch's own layer: see `fastlstm.backends.triton.tiles`."""
    from fastlstm.backends.triton import launch, tiles

    return tiles.is_faster(launch.describe_layer(layer, resolve_precision(layer.x.dtype, precision))[1])


def with_precision(precision: str) -> SimpleNamespace:
    """Return this backend with "ieee" or "tf32" products in float32, whatever torch's setting says."""
    named = {function.__name__: function for function in (check, forward, backward, plan)}
    functions = {name: partial(function, precision=precision) for name, function in named.items()}
    return SimpleNamespace(supports=supports, saved_shape=saved_shape, TRAITS=TRAITS, **functions)


def plan(
    layer: Layer,
    save: bool,
    packed_weights: dict[Any, Any] | None,
    state_axes: tuple[int, ...],
    precision: str | None = None,
) -> base.Plan:
    """Return a plan for calls like that of `layer`, which keeps no weights. `state_axes`: leading ones of states."""
    return Plan(layer, save, state_axes, precision)


def forward(layer: Layer, save: bool, precision: str | None = None) -> Run:
    """See `fastlstm.backends.reference.forward`."""
    from fastlstm.backends.triton import launch

    return launch.Forward(layer, save, resolve_precision(layer.x.dtype, precision)).run(layer)


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients, precision: str | None = None) -> Gradients:
    """See `fastlstm.backends.reference.backward`."""
    from fastlstm.backends.triton import backward_pass

    return backward_pass.Backward(layer, needs, resolve_precision(layer.x.dtype, precision)).run(grads, layer, run)


class Plan:
    """How calls like an example run, see `fastlstm.backends.base.Plan`. It keeps passes by precision and by which
    gradients come in or are wanted.
    """

    backend: str
    types: Any
    reads_h = True
    accumulates = False
    known: dict[Any, Any]
    loop: Any

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
            from fastlstm.backends.triton.launch import Forward

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
            from fastlstm.backends.triton.backward_pass import Backward

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
