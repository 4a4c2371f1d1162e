"""ncps: its `CfC` runs each layer of its wiring by one call for all steps, on the CPU.

A `CfC` with a backbone or with `mixed_memory` stays as it is. A wiring has no backbone. Without a wiring the package
makes one, unless ``backbone_layers=0``.
"""

from typing import Any

import torch
from torch import Tensor

from fastlstm.cells import abs, cell, cfc, exp, sigmoid, tanh  # noqa: A004  # Python's own
from fastlstm.integrations.calls import run_cell, takes
from fastlstm.integrations.places import Place, Places


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
    cells, has_steps, time = _cells_of(module), module.return_sequences, int(module.batch_first)
    if input.dim() == 2 and has_steps:  # one sequence
        rows: Any = [
            a if a is None else a.unsqueeze(dim) for a, dim in ((input, 1 - time), (hx, 0), (timespans, 1 - time))
        ]
        results = _run(module, *rows)
        return results if results is None else (results[0].squeeze(1 - time), results[1][0])
    if not takes(input, hx, timespans, *module.parameters()) or input.dim() != 3 or (hx is not None and hx.dim() != 2):
        return None
    x = input.movedim(time, 0)
    (T, B, _), sizes = x.shape, [layer.hidden_size for layer in cells]
    gaps = x.new_ones(T) if timespans is None else timespans.movedim(time, 0)
    by_units = gaps[0].numel() > 1
    if len(gaps) != T or (by_units and any(gaps.shape != (T, B, max(H, 2)) for H in sizes)):
        return None  # with a time for each row, by which the package multiplies units
    gaps, last = gaps if by_units else gaps.reshape(T, 1, 1), []
    for layer, state in zip(cells, [None] * len(cells) if hx is None else hx.split(sizes, 1), strict=True):
        inputs = (gaps.expand(T, B, layer.hidden_size),)
        x, (state,), _ = run_cell(KINDS[layer.mode], x, _weights(layer), (state,), inputs)
        last.append(state)
    output = module.fc(x).movedim(0, time) if has_steps else module.fc(x[-1])
    return output, torch.cat(last, 1)


def _weights(layer: Any) -> tuple[Any, ...]:
    """Return the weights of one cell as a `Layer` has them. The wiring masks those of the first two gates."""
    is_pure = layer.mode == "pure"
    params: Any = (layer.w_tau.flatten(), layer.A.flatten()) if is_pure else ()
    gates: Any = [layer.ff1] if is_pure else [layer.ff1, layer.ff2, layer.time_a, layer.time_b]
    masks = [1 if layer.sparsity_mask is None else layer.sparsity_mask] * 2 + [1, 1]
    weight = torch.cat([gate.weight * mask for gate, mask in zip(gates, masks)])
    bias = torch.cat([gate.bias for gate in gates])
    return *weight.split([layer.input_size, layer.hidden_size], 1), bias, None, *params


_places = Places(__name__, Place("ncps.torch", "CfC", "ncps", "1.0", _run, _unlike))
accelerate, restore = _places.accelerate, _places.restore
