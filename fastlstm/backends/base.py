"""The records that pass between a module and a backend, and the traits by which a backend describes itself.

T, B, I and H are the numbers of time steps, batch rows, inputs and hidden units. Fields that are tuples have one entry
for each weight, state or input, in the order of `Layer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastlstm.cells.spec import Cell

Optional = Tensor | None
WEIGHTS = 4  # weight_ih, weight_hh, bias_ih and bias_hh, after which a cell's params come


class Layer(NamedTuple):
    """One layer in one direction: the arguments of a run.

    Attributes:
        x: (T, B, I), any strides. For a stack of G layers it may also be (T, G, B / G, I).
        weights: weight_ih (X H, I) for a cell with X gates that sum x, weight_hh (Y H, H) for its Y gates that sum h,
            bias_ih (X H,) and bias_hh (Y H,), and then the cell's params (H,). Blocks of rows are in the order of the
            cell's gates. A bias may be None, and so may a weight that no gate of the cell sums. The weights of a stack
            of G layers have a leading axis of G, and its batch rows lie in G equal groups.
        states: the initial states (B, H) in the cell's order, h_0 first, or only Nones for zeros.
        lengths: int64 (B,), on the device of x, or None. Row b is *held* at step t if t >= lengths[b], in either
            direction: its states are carried through, and its output is zero.
        reset: bool (T, B), on the device of x, or None. The states are zero before the steps that are True, unless the
            step is held.
        reverse: the steps run from the last to the first. Results stay in the order of x.
        cell: what one step computes.
        inputs: (T, B, H) for each of the cell's inputs.
    """

    x: Tensor
    weights: tuple[Any, ...]
    states: tuple[Any, ...]
    lengths: Optional
    reset: Optional
    reverse: bool
    cell: Cell
    inputs: tuple[Any, ...] = ()

    def to(self, dtype: torch.dtype) -> "Layer":
        """Return the layer with its floating-point tensors in another type."""
        weights, states, inputs = (
            tuple(None if a is None else a.to(dtype) for a in each) for each in (self.weights, self.states, self.inputs)
        )
        return self._replace(x=self.x.to(dtype), weights=weights, states=states, inputs=inputs)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All tensors, flat, as autograd's Functions take them."""
        return self.x, *self.weights, *self.states, *self.inputs, self.lengths, self.reset

    @classmethod
    def of(cls, cell: Cell, tensors: Sequence[Any], reverse: bool) -> "Layer":
        """Return the layer of flat `tensors`."""
        *operands, lengths, reset = tensors
        x, weights, states, inputs = _cut(cell, operands)
        return cls(x, weights, states, lengths, reset, reverse, cell, inputs)


class Run(NamedTuple):
    """The results of a run. The gradients of the results, which `backward` takes, are a `Run` as well.

    Attributes:
        h: (T, B, H), the outputs, which are the first state: zero at held steps.
        last: the states (B, H) after the last step of each row, in the cell's order.
        kept: () unless asked for. The states but the first, (T, B, H) after each step, where held steps repeat the
            states before them. Then ``gates``: what else the backward pass reads, in the backend's own layout. In a
            `Run` of gradients: those of the states but the first, each of which may be None, or ().
    """

    h: Any
    last: tuple[Any, ...]
    kept: tuple[Any, ...]


class Gradients(NamedTuple):
    """The gradients of a layer's x, weights, states and inputs, or booleans that say which of them are wanted. A
    gradient that is not wanted is None.
    """

    x: Any
    weights: tuple[Any, ...]
    states: tuple[Any, ...]
    inputs: tuple[Any, ...] = ()

    @property
    def flat(self) -> tuple[Any, ...]:
        """All gradients in the order of `Layer.tensors`. lengths and reset have none."""
        return self.x, *self.weights, *self.states, *self.inputs

    @classmethod
    def of(cls, cell: Cell, flat: Sequence[Any]) -> "Gradients":
        """Return the record of `flat` gradients."""
        return cls(*_cut(cell, flat))


def _cut(cell: Cell, flat: Sequence[Any]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    x, *others = flat
    weights, states = WEIGHTS + len(cell.params), len(cell.states)
    return x, tuple(others[:weights]), tuple(others[weights : weights + states]), tuple(others[weights + states :])


# The tensors of a layer, in the order of `Layer.tensors`, as a schema of torch.library writes them.
OPERANDS = (
    "Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? h_0, Tensor? c_0, "
    "Tensor? lengths, Tensor? reset"
)


class Plan(Protocol):
    """How a backend runs calls of one signature: of the same shapes, strides, types, and settings.

    The layers of a plan may differ from those of `forward` and `backward` in two ways. The states may be (1, B, H), and
    then those of the run and their gradients are so too. And x may be (B, I), for one step alone: then ``h`` is None.

    Attributes:
        backend: its name, which whoever made the plan sets.
        keeps_cells: what runs keep is c (T, B, H) and the gates, in the layer's type. Otherwise it is what the plan's
            own backward pass reads.
        reads_h: whether the backward pass reads the run's ``h``.
    """

    backend: str
    keeps_cells: bool
    reads_h: bool

    def forward(self, layer: Layer) -> Run: ...

    def backward(self, grads: Run, layer: Layer, run: Run, needs: Gradients) -> Gradients: ...


@dataclass(frozen=True)
class Traits:
    """What a backend can do beyond `forward` and `backward` of float32 layers. A misspelt trait fails at the import.

    Attributes:
        takes_sixteen_bits: `forward` and `backward` take bfloat16 and float16. Without it they get float32 copies.
        plans: it has `plan`, which prepares calls of one signature and keeps weights packed from call to call.
        plans_sixteen_bits: `plan` takes layers of bfloat16 and float16, and weights that autocast would cast to them.
        sorts_lengths: it is faster if the longest rows come first.
    """

    takes_sixteen_bits: bool = False
    plans: bool = False
    plans_sixteen_bits: bool = False
    sorts_lengths: bool = False


def held_steps(layer: Layer) -> Optional:
    """Return a mask of the held steps, bool (T, B, 1), or None for a layer without lengths."""
    if layer.lengths is None:
        return None
    steps = torch.arange(layer.x.shape[0], device=layer.x.device)
    return (steps.unsqueeze(1) >= layer.lengths).unsqueeze(-1)


def reset_steps(layer: Layer, held: Optional) -> Optional:
    """Return a mask of the steps before which the states are zero, bool (T, B, 1). No held step is one of them."""
    if layer.reset is None:
        return None
    reset = layer.reset.unsqueeze(-1)
    return reset if held is None else reset & ~held


def sum_of(first: Optional, second: Optional) -> Optional:
    """Return the sum of two tensors. Either may be None, which counts as zero."""
    return second if first is None else first if second is None else first + second


def sum_of_biases(layer: Layer) -> Optional:
    """Return bias_ih + bias_hh, or None for a layer without biases."""
    return sum_of(*layer.weights[2:])


def wants_bias(needs: Gradients) -> bool:
    """Return whether a gradient of either bias is wanted."""
    return any(needs.weights[2:])


def bias_gradients(dbias: Optional, needs: Gradients) -> tuple[Optional, Optional]:
    """Return the gradients of both biases, which are equal to `dbias`, the gradient of their sum.

    Each has a tensor of its own, so in-place changes of one do not reach the other.
    """
    to_ih, to_hh = needs.weights[2:]
    second = dbias if to_hh else None
    return dbias if to_ih else None, second.clone() if second is not None and to_ih else second


def flat_input(x: Tensor) -> Tensor:
    """Return ``x`` as (T, B, I), if a stack's groups have an axis of their own: (T, G, B / G, I)."""
    return x.flatten(1, 2) if x.dim() == 4 else x


def given_states(layer: Layer) -> tuple[Tensor, ...]:
    """Return the initial states, or zeros expanded from one row. With a projection h_0 is P wide and c_0 is H wide."""
    if layer.states[0] is not None:
        return layer.states
    rows, (H4, P) = flat_input(layer.x).shape[1], layer.weights[1].shape[-2:]
    zeros = layer.x.new_zeros(1, P).expand(rows, -1)
    return zeros, zeros if H4 == 4 * P else layer.x.new_zeros(1, H4 // 4).expand(rows, -1)


def check_layer(layer: Layer, weight_hr: Optional = None) -> None:
    """Raise unless the tensors make one layer in one direction.

    Args:
        layer: one layer, not a stack.
        weight_hr: (P, H), or None. With it h_0 must be (B, P) and weight_hh (4H, P).

    Raises:
        ValueError: naming the argument, the shape, dtype or device it must have, and the one it has.
    """
    x, (weight_ih, weight_hh, bias_ih, bias_hh), (h_0, c_0), lengths, reset, *_ = layer
    if x.dim() != 3:
        raise ValueError(f"x must have shape (T, B, I), got {tuple(x.shape)}")
    T, B, I = x.shape
    rows = weight_ih.shape[0]
    hidden, odd = rows // 4, rows % 4  # dynamo knows no divmod of symbols
    if odd or weight_ih.dim() != 2 or weight_ih.shape[1] != I:
        raise ValueError(f"weight_ih must have shape (4H, I) with I = {I}, got {tuple(weight_ih.shape)}")
    if rows == 0:
        raise ValueError(f"weight_ih must have shape (4H, I) with H of 1 or more, got {tuple(weight_ih.shape)}")
    out = hidden if weight_hr is None else weight_hr.shape[0]
    # zip gets no `strict`: Dynamo of torch 2.9 reads strict=False as true
    for a, name, shape in (
        (weight_hh, "weight_hh", (rows, out)),
        (bias_ih, "bias_ih", (rows,)),
        (bias_hh, "bias_hh", (rows,)),
        (h_0, "h_0", (B, out)),
        (c_0, "c_0", (B, hidden)),
        (lengths, "lengths", (B,)),
        (reset, "reset", (T, B)),
    ):
        if a is not None and a.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(a.shape)}")
    if weight_hr is not None and weight_hr.shape != (out, hidden):
        raise ValueError(f"weight_hr must have shape (P, H) with H = {hidden}, got {tuple(weight_hr.shape)}")
    for a, name in zip((*layer.weights, weight_hr, h_0, c_0, lengths, reset), _NAMES):
        if a is None:
            continue
        if a.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {a.device}")
        wanted = torch.int64 if name == "lengths" else torch.bool if name == "reset" else x.dtype
        if a.dtype is not wanted:
            of_x = "of x, " if wanted is x.dtype else ""
            raise ValueError(f"{name} must have the dtype {of_x}{wanted}, got {a.dtype}")


_NAMES = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "h_0", "c_0", "lengths", "reset"
