"""torch's own LSTM, GRU and RNN, for calls that no fused backend supports: projections, devices without a kernel, and
ONNX.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Layer, Run, Traits, given_states
from fastlstm.cells.spec import Cell
from fastlstm.torch_private import watched

_FUNCTIONS: dict[str, Any] = {
    "lstm": torch.lstm,
    "gru": torch.gru,
    "elman_tanh": torch.rnn_tanh,
    "elman_relu": torch.rnn_relu,
}
TRAITS = Traits(takes_sixteen_bits=True, cells=tuple(_FUNCTIONS))


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the backend cannot run, or None."""
    return None  # torch raises its own errors


def exports_onnx() -> bool:
    """Return whether `torch.onnx.export` traces the call, not one in another thread. An export has imported torch.onnx
    already. To import it here would take as long as to import all of this package.
    """
    if "torch.onnx" not in sys.modules or not torch.onnx.is_in_onnx_export():
        return False
    return bool(watched()) or torch.jit.is_tracing()


def forward(layer: Layer) -> Run:
    """Run one layer in one direction, as the module of `torch.nn` does: h is (T, B, P), and the last states are (B, P)
    and (B, H).
    """
    x, (weight_ih, weight_hh, bias_ih, bias_hh), _, _, _, reverse, cell, *_ = layer
    if (bias_ih is None) is not (bias_hh is None):  # torch's layers take both biases or none
        other = bias_ih if bias_hh is None else bias_hh
        bias_ih, bias_hh = (torch.zeros_like(other) if a is None else a for a in (bias_ih, bias_hh))
    weights = [a for a in (weight_ih, weight_hh, bias_ih, bias_hh, layer.weight_hr) if a is not None]
    # torch.jit.trace runs with gradients and without, and both runs have to record the same
    train = torch.is_grad_enabled() or torch.jit.is_tracing()
    states, has_biases = given_states(layer), bias_ih is not None
    if exports_onnx() and not torch.jit.is_tracing():  # the older exporter, which traces, translates torch's own
        return _onnx_node(cell, x, weights, states, reverse, has_biases)
    if reverse:
        x = x.flip(0)
    first = [a.unsqueeze(0).contiguous() for a in states]  # cuDNN needs contiguous states
    given: Any = first if len(first) > 1 else first[0]
    y, *last = _FUNCTIONS[cell.key](x, given, weights, has_biases, 1, 0.0, train, False, False)
    # clones, since views cannot be detached in place
    return Run(y.flip(0) if reverse else y, tuple(a.squeeze(0).clone() for a in last), ())


# ONNX's operators: their name, the places of torch's row blocks in theirs, and attributes. Their GRU multiplies before
# it resets, if it is told so. They keep z, then r.
_NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "elman_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "elman_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}


def _onnx_node(
    cell: Cell, x: Tensor, weights: list[Tensor], states: tuple[Tensor, ...], reverse: bool, has_biases: bool
) -> Run:
    """Run `forward` as ONNX's own operator. torch's would fix the number of time steps at the example's."""
    (T, B, _), H = x.shape, states[0].shape[1]
    name, order, attributes = _NODES[cell.key]

    def reordered(a: Tensor) -> Tensor:
        blocks = a.split(H)
        return torch.cat([blocks[k] for k in order]).unsqueeze(0)

    weight_ih, weight_hh, *biases = map(reordered, weights)
    y, *last = torch.onnx.ops.symbolic_multi_out(
        name,
        (
            x,
            weight_ih,
            weight_hh,
            torch.cat(biases, 1) if has_biases else None,
            None,  # no lengths: all rows are equally long
            *(a.unsqueeze(0) for a in states),
        ),
        {"direction": "reverse" if reverse else "forward", "hidden_size": H, **attributes},
        dtypes=(x.dtype,) * (1 + len(states)),
        shapes=((T, 1, B, H), *[(1, B, H)] * len(states)),
    )
    return Run(y.squeeze(1), tuple(a.squeeze(0) for a in last), ())
