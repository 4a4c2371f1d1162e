"""Layers of any cell on NVIDIA GPUs: Triton kernels compiled when first used.

`tiles` chooses between one launch for all time steps (`resident`) and one launch a step (`stepwise`). The gradients of
the weights, the bias and the input are products over all steps at once and go to torch. Under ``TRITON_INTERPRET=1``
the same kernels run on CPU tensors. Functions here import the kernels at their first call, since those import triton.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

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
    from fastlstm.backends.triton import plans

    return plans.Plan(layer, save, state_axes, precision)


def forward(layer: Layer, save: bool, precision: str | None = None) -> Run:
    """See `fastlstm.backends.reference.forward`."""
    from fastlstm.backends.triton import launch

    return launch.Forward(layer, save, resolve_precision(layer.x.dtype, precision)).run(layer)


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients, precision: str | None = None) -> Gradients:
    """See `fastlstm.backends.reference.backward`."""
    from fastlstm.backends.triton import backward_pass

    return backward_pass.Backward(layer, needs, resolve_precision(layer.x.dtype, precision)).run(grads, layer, run)
