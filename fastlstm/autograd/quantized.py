"""How a call of an int8 layer gets to its backend, and the operators for compilers and exporters.

A plain call without gradients follows a plan, which keeps packed weights. All others take ``fastlstm::quantized_lstm``
or ``fastlstm::quantized_gru``. Results have a backward pass that raises, since int8 weights have no gradient.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fastlstm.autograd.modes import is_plain, is_untransformed, wants_autograd, wants_gradient
from fastlstm.autograd.operators import LIBRARIES, define, tensors_of
from fastlstm.backends import aten, dispatch, settings
from fastlstm.backends.base import Layer, Run, empty_run
from fastlstm.backends.cpu import threads_now
from fastlstm.backends.quantized import check_quantized_layer
from fastlstm.cells.library import gru, lstm
from fastlstm.cells.spec import Cell
from fastlstm.torch_private import dual_level, transformed

MOST = 256  # plans that are kept for one layer and direction
Runs = Callable[[Layer], Run]
INSTEAD = "train the float model, which fastlstm.dequantize(model) gives back"
NO_GRADIENT = f"int8 weights are for inference and have no gradient: {INSTEAD}, or call this one under torch.no_grad()"


def find(layer: Layer, activations: int, backend: str | None, plans: dict[Any, Any]) -> tuple[Any, Runs | None]:
    """Return (signature, None) if the signature is new, (None, plan) if not, (None, None) if no plan can serve.

    The arguments are those of `run`.
    """
    x, weights, states, lengths, reset, reverse, _, _ = layer
    tensors = x, *states, lengths, reset
    if not is_untransformed(*tensors) or not is_plain(*weights) or wants_gradient(*tensors, *weights):
        return None, None
    signature = (
        x.shape, x.stride(), x.dtype, x.device, reverse, lengths is None, reset is None, activations,
        settings.named(backend), threads_now(),
        *[None if a is None else (a.shape, a.dtype, a.device) for a in (*weights, *states)],
    )  # fmt: skip
    return (None, plans.get(signature)) if signature in plans else (signature, None)


def run(layer: Layer, activations: int, backend: str | None, plans: dict[Any, Any] | None) -> Run:
    """Run an int8 layer in one direction.

    Args:
        layer: with the weights of `fastlstm.backends.quantized`, and x (T, B, I) and states (1, B, H) of float32. The
            last states are (1, B, H), too.
        activations: 8 or 16, the bits of x and h in products.
        backend: a name of `fastlstm.backends.settings.NAMES`. None takes the default that `use_backend` sets.
        plans: where plans and packed weights are kept, or None to go without.

    Raises:
        ValueError: for tensors that make no layer, and for an unknown backend.
        RuntimeError: under torch.func's derivatives, in forward mode, in an export to ONNX, and if a backend that was
            asked for by name cannot run them. The backward pass of the results raises too.
    """
    if plans is not None:
        signature, plan = find(layer, activations, backend, plans)
        if signature is not None:
            plan = _plan(layer, activations, backend, plans)
            while len(plans) > MOST:
                with suppress(StopIteration, RuntimeError):  # another thread may be here as well
                    plans.pop(next(key for key in plans if key != "kept"), None)  # the oldest
            plans[signature] = plan
        if plan is not None:
            return plan(layer)
    if not torch.compiler.is_compiling() and (transformed() or dual_level()) and wants_autograd(layer.x, *layer.states):
        raise RuntimeError(NO_GRADIENT)
    options = layer.reverse, activations, settings.named(backend)
    h, *last = operators[layer.cell.key](*layer.squeezed(True).tensors, *options)
    return Run(h, tuple([torch.stack([a]) for a in last]), ())  # views, as of unsqueeze, cannot be detached in place


def _plan(layer: Layer, activations: int, backend: str | None, plans: dict[Any, Any]) -> Runs | None:
    check_quantized_layer(layer.squeezed(True))
    module = dispatch.module(dispatch.choose_quantized(backend, layer.x.device, layer.cell))
    if 0 in layer.x.shape[:2] or not hasattr(module, "quantized_plan"):
        return None
    with torch.inference_mode(False), torch.no_grad():
        made: Runs = module.quantized_plan(layer, activations, plans.setdefault("kept", {}), (1,)).forward
    return made


def _define(cell: Cell) -> Any:
    """Define the operator of a cell."""
    name, states = f"quantized_{cell.key}", len(cell.states)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, reverse, activations, backend = args
        layer = Layer.of(cell, tensors, reverse)
        check_quantized_layer(layer)
        module = dispatch.module(dispatch.choose_quantized(backend, layer.x.device, cell))
        found = empty_run(layer) if 0 in layer.x.shape[:2] else module.quantized_forward(layer, activations)
        return found.h, *found.last

    tensors = (
        "Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor weight_ih_scale, "
        f"Tensor weight_hh_scale, {', '.join(f'Tensor? {state}_0' for state in cell.states)}, Tensor? lengths, "
        "Tensor? reset"
    )
    schema = f"({tensors}, bool reverse, int activations, str backend) -> {tensors_of(1 + states)}"
    operator = define(name, schema, forward)

    @torch.library.register_fake(f"fastlstm::{name}", lib=LIBRARIES[name])
    def _(*args: Any) -> tuple[Tensor, ...]:
        if aten.exports_onnx():
            raise RuntimeError("ONNX has no operator of int8 layers: export the float model that dequantize gives back")
        x, H = args[0], args[2].shape[1]
        return (*(x.new_empty(shape) for shape in ((*x.shape[:2], H), *[(x.shape[1], H)] * states)),)

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(NO_GRADIENT)

    torch.library.register_autograd(f"fastlstm::{name}", backward, lib=LIBRARIES[name])
    return operator


operators: dict[str, Any] = {cell.key: _define(cell) for cell in (lstm, gru)}  # compilers look for no Cell
