"""What an export to ONNX gets: a node of ONNX's own for each layer."""

import sys
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Run
from fastlstm.cells.spec import Cell
from fastlstm.torch_private import dispatch_mode_count

# ONNX's operators: their name, the places of torch's row blocks in theirs, and attributes. ONNX has the GRU's blocks in
# the order z, r, n. With `linear_before_reset` its reset gate acts after the product with h, as torch's does.
NODES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "elman_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "elman_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}


def is_exporting() -> bool:
    """Return whether `torch.onnx.export`, which has imported torch.onnx, traces the call in this thread."""
    if "torch.onnx" not in sys.modules or not torch.onnx.is_in_onnx_export():
        return False
    return bool(dispatch_mode_count()) or torch.jit.is_tracing()


def node(
    cell: Cell, x: Tensor, weights: list[Tensor], states: tuple[Tensor, ...], reverse: bool, has_biases: bool
) -> Run:
    """Run a layer as ONNX's own operator. torch's would fix the number of time steps at the example's."""
    (T, B, _), H = x.shape, states[0].shape[1]
    name, order, attributes = NODES[cell.key]

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
