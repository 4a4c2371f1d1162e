"""torch's own layers, for projections on a GPU or without Numba, devices without a kernel, exports to ONNX, and some
single steps.
"""

from threading import local
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastlstm.backends import onnx, settings
from fastlstm.backends.base import (
    Layer,
    Run,
    Traits,
    active_input,
    fill,
    given_states,
    held_steps,
)
from fastlstm.backends.cpu import LARGE, threads_now
from fastlstm.cells.spec import Cell
from fastlstm.torch_private import rnn_precision

_FUNCTIONS: dict[str, Any] = {
    "lstm": torch.lstm,
    "lstm_projected": torch.lstm,
    "gru": torch.gru,
    "elman_tanh": torch.rnn_tanh,
    "elman_relu": torch.rnn_relu,
}
_STEPS: dict[str, Any] = {
    "lstm": torch.lstm_cell,
    "gru": torch.gru_cell,
    "elman_tanh": torch.rnn_tanh_cell,
    "elman_relu": torch.rnn_relu_cell,
}
VECTOR_BYTES = 64  # of the widest vectors that a kernel of numba has
FEW_PRODUCTS = 1 << 19  # multiplications of a step of an LSTM or a GRU below which torch's operator trains it faster
FEW_ROWS = 8  # rows of a step of a plain RNN up to which torch's operator is faster without gradients too
TRAITS = Traits(takes_sixteen_bits=True, products=True, projections=True, cells=tuple(_FUNCTIONS))


class _Thread(local):
    runs_here = False


thread = _Thread()  # whether this backend runs in it: then `fastlstm.patch_operators` leaves operators to torch's code


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    return None  # torch raises its own errors


def packs(device: torch.device) -> bool:
    """Return whether lengths can be packed, for which torch reads them on the CPU, and so waits for the device."""
    if device.type != "cuda":
        return True
    return not torch.cuda.is_current_stream_capturing() and torch.cuda.get_sync_debug_mode() < 2


def runs_step(cell: Cell, x: Tensor, hidden_size: int) -> bool:
    """Return whether torch's operator of a cell runs a single step, x (B, I) of plain memory, faster than a kernel.

    What Python does around a kernel weighs most in a step of a plain RNN, whose cell is one tanh or ReLU, and in a step
    of few products that trains. A kernel packs weights with rows that end inside a vector. So torch trains steps of
    more products with these, and reads them faster than a kernel packs them if they are large and there is one row.
    """
    if cell.key not in _STEPS or x.dim() != 2 or not x.is_cpu or x.itemsize < 4:
        return False
    rows, columns = x.shape
    products = rows * cell.gates_of_h * hidden_size * (columns + hidden_size)
    ends_inside = hidden_size * x.itemsize % VECTOR_BYTES > 0
    if cell.key in ("elman_tanh", "elman_relu"):
        is_faster = rows <= FEW_ROWS or torch.is_grad_enabled()
    elif torch.is_grad_enabled():
        is_faster = products < (2 * FEW_PRODUCTS if ends_inside else FEW_PRODUCTS)
    else:
        is_faster = ends_inside and rows == 1 and products * x.itemsize > LARGE and threads_now() == 1
    # a setting of precision is for the kernels, and autocast casts for them
    return is_faster and not (
        settings.invariant() or torch.is_autocast_enabled("cpu") or rnn_precision() in ("bf16", "tf32")
    )


def step(
    cell: Cell, x: Tensor, states: tuple[Any, ...], weights: tuple[Any, ...], hidden_size: int
) -> tuple[Tensor, ...]:
    """Return the states after a single step, of which autograd sees every operation. States of None are zeros."""
    if states[0] is None:
        states = (x.new_zeros(x.shape[0], hidden_size),) * len(states)
    thread.runs_here = True
    try:
        last = _STEPS[cell.key](x, states if len(states) > 1 else states[0], *weights)
    finally:
        thread.runs_here = False
    return last if len(states) > 1 else (last,)


def forward(layer: Layer) -> Run:
    """Run one layer in one direction, as the module of `torch.nn` does: h is (T, B, P), the last states (B, P) and (B,
    H), for a projection to P or P = H.
    """
    thread.runs_here = True
    try:
        return _forward(layer)
    finally:
        thread.runs_here = False


def _forward(layer: Layer) -> Run:
    x, (weight_ih, weight_hh, bias_ih, bias_hh, *weight_hr), _, _, _, reverse, cell, *_ = layer
    if (bias_ih is None) is not (bias_hh is None):  # torch's layers take both biases or none
        other = bias_ih if bias_hh is None else bias_hh
        bias_ih, bias_hh = (torch.zeros_like(other) if a is None else a for a in (bias_ih, bias_hh))
    weights = [a for a in (weight_ih, weight_hh, bias_ih, bias_hh, *weight_hr) if a is not None]
    # torch.jit.trace runs with gradients and without, and both runs have to record the same
    train = torch.is_grad_enabled() or torch.jit.is_tracing()
    states, has_biases = given_states(layer), bias_ih is not None
    if onnx.is_exporting() and not torch.jit.is_tracing():  # the older exporter, which traces, translates torch's own
        return onnx.node(cell, x, weights, states, reverse, has_biases)
    lengths, run = layer.lengths, _FUNCTIONS[cell.key]
    first = [a.unsqueeze(0).contiguous() for a in states]  # cuDNN needs contiguous states
    if lengths is None:
        states_argument: Any = first if len(first) > 1 else first[0]
        y, *last = run(x.flip(0) if reverse else x, states_argument, weights, has_biases, 1, 0.0, train, False, False)
        # clones, since views cannot be detached in place
        return Run(y.flip(0) if reverse else y, tuple(a.squeeze(0).clone() for a in last), ())
    lengths = lengths.clamp(0, x.shape[0])
    x = _turned(active_input(layer, held_steps(layer)), lengths, reverse)
    packed = pack_padded_sequence(x, lengths.clamp(1).cpu(), enforce_sorted=False)  # of one step at least
    sorted_rows, rows = cast(Any, (packed.sorted_indices, packed.unsorted_indices))
    empty = (lengths == 0).unsqueeze(1)
    first = [fill(a, empty).index_select(1, sorted_rows) for a in first]
    states_argument = first if len(first) > 1 else first[0]
    data, *last = run(packed.data, packed.batch_sizes, states_argument, weights, has_biases, 1, 0.0, train, False)
    y, _ = pad_packed_sequence(packed._replace(data=data), total_length=x.shape[0])
    last = [a.squeeze(0).index_select(0, rows) for a in last]
    y = fill(_turned(y, lengths, reverse), empty)
    return Run(y, tuple(torch.where(empty, state, a) for state, a in zip(states, last)), ())


def _turned(a: Tensor, lengths: Tensor, reverse: bool) -> Tensor:
    """Return (T, B, N) with each row's steps in the other order but those beyond its length, if `reverse`."""
    if not reverse:
        return a
    steps = torch.arange(a.shape[0], device=a.device).unsqueeze(1)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)
    return a.gather(0, index.unsqueeze(2).expand_as(a))
