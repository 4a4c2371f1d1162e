"""torch's own LSTM, GRU and RNN, for calls that no fused backend supports: projections, devices without a kernel, and
ONNX.
"""

import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastlstm.backends.base import Layer, Run, Traits, fill, given_states, held_steps
from fastlstm.cells.spec import Cell
from fastlstm.torch_private import dispatch_mode_count

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
    return bool(dispatch_mode_count()) or torch.jit.is_tracing()


def packs(device: torch.device) -> bool:
    """Return whether lengths can be packed, for which torch reads them on the CPU, and so waits for the device."""
    if device.type != "cuda":
        return True
    return not torch.cuda.is_current_stream_capturing() and torch.cuda.get_sync_debug_mode() < 2


def forward(layer: Layer) -> Run:
    """Run one layer in one direction, as the module of `torch.nn` does: h is (T, B, P), and the last states are (B, P)
    and (B, H). P is the size of a projection, or H without one. Lengths go to torch as a `PackedSequence`.
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
    lengths, run = layer.lengths, _FUNCTIONS[cell.key]
    first = [a.unsqueeze(0).contiguous() for a in states]  # cuDNN needs contiguous states
    if lengths is None:
        states_argument: Any = first if len(first) > 1 else first[0]
        y, *last = run(x.flip(0) if reverse else x, states_argument, weights, has_biases, 1, 0.0, train, False, False)
        # clones, since views cannot be detached in place
        return Run(y.flip(0) if reverse else y, tuple(a.squeeze(0).clone() for a in last), ())
    lengths = lengths.clamp(0, x.shape[0])
    x = _turned(fill(x, held_steps(layer)), lengths, reverse)
    packed = pack_padded_sequence(x, lengths.clamp(1).cpu(), enforce_sorted=False)  # of one step at least
    sorted_rows, rows = cast(Any, (packed.sorted_indices, packed.unsorted_indices))
    first = [a.index_select(1, sorted_rows) for a in first]
    states_argument = first if len(first) > 1 else first[0]
    data, *last = run(packed.data, packed.batch_sizes, states_argument, weights, has_biases, 1, 0.0, train, False)
    y, _ = pad_packed_sequence(packed._replace(data=data), total_length=x.shape[0])
    last = [a.squeeze(0).index_select(0, rows) for a in last]
    empty = (lengths == 0).unsqueeze(1)
    y = fill(_turned(y, lengths, reverse), empty)
    return Run(y, tuple(torch.where(empty, state, a) for state, a in zip(states, last)), ())


def _turned(a: Tensor, lengths: Tensor, reverse: bool) -> Tensor:
    """Return (T, B, N) with the steps of each row in the other order, those beyond its length left alone, if
    `reverse`.
    """
    if not reverse:
        return a
    steps = torch.arange(a.shape[0], device=a.device).unsqueeze(1)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return a.gather(0, index.unsqueeze(2).expand_as(a))


# ONNX's operators: their name, the places of torch's row blocks in theirs, and attributes. ONNX has the GRU's blocks in
# the order z, r, n. With `linear_before_reset` its reset gate acts after the product with h, as torch's does.
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
