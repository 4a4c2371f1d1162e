"""How a call of an int8 layer gets to the kernels: a plain call by a plan, which keeps packed weights, all others by
``fastlstm::quantized_lstm`` or ``fastlstm::quantized_gru``. Results' backward pass raises.
"""

from typing import Any

import torch
from torch import Tensor

from fastlstm.autograd.modes import wants_autograd, wants_gradient
from fastlstm.autograd.operators import LIBRARIES, check_memory, define, tensors_of
from fastlstm.backends import dispatch, native, onnx, settings
from fastlstm.backends.base import Layer, Run, empty_run
from fastlstm.cells.library import gru, lstm
from fastlstm.cells.spec import Cell
from fastlstm.int8 import definition
from fastlstm.plan_cache import Plans, Runs
from fastlstm.torch_private import dual_level, transformed

INSTEAD = "train the float model, which fastlstm.dequantize(model) gives back"
NO_GRADIENT = f"int8 weights are for inference and have no gradient: {INSTEAD}, or call this one under torch.no_grad()"


def choose(name: str | None, device: torch.device) -> str:
    """Return the backend that runs int8 layers on this device: native on a CPU, reference on another. `name`: of
    `fastlstm.backends.settings.NAMES`, None for the default.

    Raises:
        RuntimeError: if the backend that was asked for by name cannot, or native is not there, with the reason.
        ValueError: for an unknown name.
    """
    name = settings.check_name(settings.named(name))
    if name not in ("auto", "native", "reference"):
        raise RuntimeError(f"the {name} backend has no kernels for int8 weights")
    taken = name if name != "auto" else "native" if device.type == "cpu" else "reference"
    reason = dispatch.module(taken).supports(device, torch.float32)
    if reason is not None and name == "auto":
        reason = (
            f"int8 layers need the compiled library, and {reason}. Install fastlstm again with FASTLSTM_NATIVE=1 "
            "in the environment, or call fastlstm.use_backend('reference'), which is plain PyTorch"
        )
    if reason is not None:
        raise RuntimeError(reason)
    return taken


def run(layer: Layer, plans: Plans | None, backend: str | None, has_layer_axis: bool) -> Run:
    """Run an int8 layer in one direction.

    Args:
        layer: x (T, B, I) and states of float32, with scales. For a single step x may also be (B, I).
        plans: the plans of the layer, or None to go without.
        backend: as in `choose`.
        has_layer_axis: whether the states are (1, B, H), in the layer and in the result, or (B, H).

    Raises:
        ValueError: for tensors that make no layer, and for an unknown backend.
        RuntimeError: under torch.func's derivatives, in forward mode, in an export to ONNX, and if a backend that was
            asked for by name cannot run them. The backward pass of the results raises too.
    """
    if plans is not None:
        plan = plans.get(layer, backend, has_layer_axis, _plan)
        if plan is not None:
            return plan(layer)
    if not torch.compiler.is_compiling() and (transformed() or dual_level()) and wants_autograd(layer.x, *layer.states):
        raise RuntimeError(NO_GRADIENT)
    x, weights, states, lengths, reset, *_ = layer.squeezed(has_layer_axis)
    options = layer.reverse, layer.activations, settings.named(backend)
    h, *last = operators[layer.cell.key](x, *weights, *layer.scales, *states, lengths, reset, *options)
    if has_layer_axis:  # stack, since unsqueeze gives views, which cannot be detached in place
        last = [torch.stack([a]) for a in last]
    return Run(h, tuple(last), ())


def _plan(
    layer: Layer, backend: str | None, has_layer_axis: bool, packed_weights: dict[Any, Any] | None
) -> Runs | None:
    """Make the plan of a plain call, see `fastlstm.plan_cache.Plans.get`."""
    layer_3d = layer.squeezed(has_layer_axis)
    definition.check(layer_3d)
    taken = choose(backend, layer.x.device)
    if taken != "native" or 0 in layer_3d.x.shape[:2] or wants_gradient(*layer.tensors, *layer.scales):
        return None
    with torch.inference_mode(False), torch.no_grad():
        return native.plan(layer, False, packed_weights, (1,) * has_layer_axis).forward


def steps_of(layer: Layer, backend: str | None, packed_weights: dict[Any, Any]) -> Any:
    """Return what runs single steps of a layer for a stream, or None where no kernel does. See `native.steps`."""
    if layer.x.dtype is not torch.float32 or choose(backend, layer.x.device) != "native":
        return None
    return native.steps(layer, packed_weights)


def _define(cell: Cell) -> Any:
    name, states = f"quantized_{cell.key}", len(cell.states)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        (x, *tensors, lengths, reset), (reverse, activations, backend) = args[:-3], args[-3:]
        weights, scales, first = tuple(tensors[:4]), tuple(tensors[4:6]), tuple(tensors[6:])
        layer = Layer(x, weights, first, lengths, reset, reverse, cell, (), scales, activations)
        definition.check(layer)
        check_memory(layer)
        is_native = choose(backend, x.device) == "native"
        if 0 in x.shape[:2]:
            run = empty_run(layer)
        else:
            run = native.forward(layer, False) if is_native else definition.forward(layer)
        return run.h, *run.last

    tensors = (
        "Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor weight_ih_scale, "
        f"Tensor weight_hh_scale, {', '.join(f'Tensor? {state}_0' for state in cell.states)}, Tensor? lengths, "
        "Tensor? reset"
    )
    schema = f"({tensors}, bool reverse, int activations, str backend) -> {tensors_of(1 + states)}"
    operator = define(name, schema, forward)

    @torch.library.register_fake(f"fastlstm::{name}", lib=LIBRARIES[name])
    def _(*args: Any) -> tuple[Tensor, ...]:
        if onnx.is_exporting():
            raise RuntimeError("ONNX has no operator of int8 layers: export the float model that dequantize gives back")
        x, H = args[0], args[2].shape[1]
        return (*(x.new_empty(shape) for shape in ((*x.shape[:2], H), *[(x.shape[1], H)] * states)),)

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(NO_GRADIENT)

    torch.library.register_autograd(f"fastlstm::{name}", backward, lib=LIBRARIES[name])
    return operator


operators: dict[str, Any] = {cell.key: _define(cell) for cell in (lstm, gru)}  # compilers look for no Cell
