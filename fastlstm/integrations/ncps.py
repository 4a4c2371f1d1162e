"""ncps: its `CfC` runs fastlstm on the CPU, with a wiring or without one:

    model = ncps.torch.CfC(20, ncps.wirings.AutoNCP(64, 8))
    fastlstm.integrations.ncps.accelerate(model)

The package runs its closed-form continuous-time networks one step after the other, and in each step one layer of the
wiring after the other. After `accelerate` each layer makes one call for all steps, in each `mode`. A `CfC` with a
backbone or with `mixed_memory` stays as it is. A wiring has no backbone. Without a wiring the package makes one, unless
``backbone_layers=0``.

`accelerate` and `restore` are those of `fastlstm.integrations.places.Places`.
"""

from typing import Any

import torch
from torch import Tensor

from fastlstm.cells import abs, cell, cfc, exp, sigmoid, tanh  # noqa: A004  # Python's own
from fastlstm.integrations.places import Place, Places, run_cell, takes


@cell(gates={"f_1": "xh", "f_2": "xh", "time_a": "xh", "time_b": "xh"}, states=("h",), inputs=("gap",))
def cfc_without_gate(f_1: Any, f_2: Any, time_a: Any, time_b: Any, gap: Any) -> Any:
    return tanh(f_1) + sigmoid(time_a * gap + time_b) * tanh(f_2)


@cell(gates={"f": "xh"}, states=("h",), params=("w_tau", "a"), inputs=("gap",))
def cfc_pure(f: Any, w_tau: Any, a: Any, gap: Any) -> Any:
    return a - a * exp(-gap * (abs(w_tau) + abs(f))) * f


KINDS = {"default": cfc, "no_gate": cfc_without_gate, "pure": cfc_pure}


def _unlike(module: Any) -> str:
    """Return what keeps a `CfC` as it is."""
    backbone = any(layer.backbone_layers for layer in _cells_of(module))
    return "it has a backbone or mixed_memory" if backbone or module.use_mixed else ""


def _cells_of(module: Any) -> list[Any]:
    """Return the cells of a `CfC` from the first layer of its wiring to the last."""
    layers = [layer for name, layer in module.rnn_cell.named_children() if name.startswith("layer_")]
    return layers or [module.rnn_cell]


def _run(module: Any, input: Tensor, hx: Tensor | None = None, timespans: Tensor | None = None) -> Any:  # noqa: A002
    """Do what `forward` of a `CfC` does."""
    cells, is_batched, has_steps = _cells_of(module), input.dim() == 3, module.return_sequences
    if not takes(input, hx, timespans, *module.parameters()) or (hx is not None and hx.dim() != input.dim() - 1):
        return None
    if not (is_batched or has_steps):
        return None
    time = 1 if module.batch_first and is_batched else 0
    x, gaps, h = input.movedim(time, 0), timespans if timespans is None else timespans.movedim(time, 0), hx
    if not is_batched:
        x, gaps, h = x.unsqueeze(1), gaps if gaps is None else gaps.unsqueeze(1), h if h is None else h.unsqueeze(0)
    (T, B, _), sizes = x.shape, [layer.hidden_size for layer in cells]
    gaps = x.new_ones(T) if gaps is None else gaps
    by_units = gaps[0].numel() > 1
    if len(gaps) != T or (by_units and any(gaps.shape != (T, B, max(H, 2)) for H in sizes)):
        return None  # with a time for each row, by which the package multiplies units
    gaps, last = gaps if by_units else gaps.reshape(T, 1, 1), []
    for layer, state in zip(cells, [None] * len(cells) if h is None else h.split(sizes, 1), strict=True):
        inputs = (gaps.expand(T, B, layer.hidden_size),)
        x, (state,), _ = run_cell(KINDS[layer.mode], x, _weights(layer), (state,), inputs)
        last.append(state)
    output, states = module.fc(x if has_steps else x[-1]), torch.cat(last, 1)
    if is_batched:
        return output.movedim(0, time) if has_steps else output, states
    return output.squeeze(1), states[0]


def _weights(layer: Any) -> tuple[Any, ...]:
    """Return the weights of one cell as a `Layer` has them: its gates' under each other, in two parts, for x and for h.
    The wiring masks those of the first two.
    """
    gates: list[Any] = [layer.ff1]
    params: tuple[Any, ...] = ()
    if layer.mode == "pure":
        params = layer.w_tau.flatten(), layer.A.flatten()
    else:
        gates += [layer.ff2, layer.time_a, layer.time_b]
    masks = [1 if layer.sparsity_mask is None else layer.sparsity_mask] * 2 + [1, 1]
    weight = torch.cat([gate.weight * mask for gate, mask in zip(gates, masks)])
    bias = torch.cat([gate.bias for gate in gates])
    return *weight.split([layer.input_size, layer.hidden_size], 1), bias, None, *params


_places = Places(__name__, Place("ncps.torch", "CfC", "ncps", "1.0", _run, _unlike))
accelerate, restore, __getattr__ = _places.accelerate, _places.restore, _places.named
