"""What goes into one layer of any cell and what comes out, and how its steps follow each other.

T, B, I and H are the numbers of time steps, batch rows, inputs and hidden units. Fields that are tuples have one entry
for each of the cell's weights, states or inputs, in the cell's order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.cells.spec import Cell

Optional = Tensor | None
WEIGHTS = 4  # weight_ih, weight_hh, bias_ih and bias_hh; the params come after them


class Layer(NamedTuple):
    """One layer in one direction: what goes into a run.

    Attributes:
        x: (T, B, I), any strides. For a stack of G layers it may also be (T, G, B / G, I).
        weights: weight_ih (X H, I) for a cell with X gates that sum x, weight_hh (Y H, H) for its Y gates that sum h,
            bias_ih (X H,) and bias_hh (Y H,), then the params (H,). Blocks of rows are in the order of the cell's
            gates. A bias may be None, and so is what a cell without such gates lacks. A stack of G layers has them with
            a leading axis of G, and its batch rows lie in G equal groups.
        states: the initial states (B, H), or Nones for zeros.
        lengths: int64 (B,), on the device of x, or None. Row b is *held* at step t if t >= lengths[b], in either
            direction: its states are carried through, and its output is zero.
        reset: bool (T, B), on the device of x, or None. The states are zero before the steps that are True, unless the
            step is held.
        reverse: the steps run from the last to the first. Results stay in the order of x.
        inputs: (T, B, H) for each of the cell's inputs.
    """

    x: Tensor
    weights: tuple[Any, ...]
    states: tuple[Any, ...]
    lengths: Optional
    reset: Optional
    reverse: bool
    inputs: tuple[Any, ...] = ()

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All operands, flat, as autograd's Functions take them."""
        return self.x, *self.weights, *self.states, *self.inputs, self.lengths, self.reset

    @classmethod
    def of(cls, cell: Cell, tensors: Sequence[Any], reverse: bool) -> "Layer":
        """The inverse of `tensors`."""
        *operands, lengths, reset = tensors
        x, weights, states, inputs = _cut(cell, operands)
        return cls(x, weights, states, lengths, reset, reverse, inputs)


class Run(NamedTuple):
    """What comes out of a run. The gradients of these, as `backward` takes them, are a `Run` as well.

    Attributes:
        h: (T, B, H), the outputs, which are the first state: zero at held steps.
        last: the states (B, H) after the last step of each row.
        kept: the other states (T, B, H) after each step, of which held steps repeat the one before; and what else
            forward saves, (T, B, K H), in the backend's own layout. Empty unless they were asked for. Of gradients:
            those of the other states, each of which may be None, or nothing.
    """

    h: Any
    last: tuple[Any, ...]
    kept: tuple[Any, ...]


class Gradients(NamedTuple):
    """The gradients of a layer's x, weights, states and inputs, each None where it is not wanted; or which are."""

    x: Any
    weights: tuple[Any, ...]
    states: tuple[Any, ...]
    inputs: tuple[Any, ...] = ()

    @property
    def flat(self) -> tuple[Any, ...]:
        """All of them in the order of `Layer.tensors`, of which the last two have no gradient."""
        return self.x, *self.weights, *self.states, *self.inputs

    @classmethod
    def of(cls, cell: Cell, flat: Sequence[Any]) -> "Gradients":
        """The inverse of `flat`."""
        return cls(*_cut(cell, flat))


def _cut(cell: Cell, flat: Sequence[Any]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    x, *others = flat
    weights, states = WEIGHTS + len(cell.params), len(cell.states)
    return x, tuple(others[:weights]), tuple(others[weights : weights + states]), tuple(others[weights + states :])


def held_steps(layer: Layer) -> Optional:
    """Where steps are held, bool (T, B, 1), or None where no row ends early."""
    if layer.lengths is None:
        return None
    steps = torch.arange(layer.x.shape[0], device=layer.x.device)
    return (steps.unsqueeze(1) >= layer.lengths).unsqueeze(-1)


def reset_steps(layer: Layer, held: Optional) -> Optional:
    """Where the states are zero before a step, bool (T, B, 1): a held step is not reset."""
    if layer.reset is None:
        return None
    reset = layer.reset.unsqueeze(-1)
    return reset if held is None else reset & ~held


def fill(a: Tensor, where: Optional) -> Tensor:
    """Zeros where a mask is True, or no mask."""
    return a if where is None else a.masked_fill(where, 0)


def flat_input(x: Tensor) -> Tensor:
    """(T, B, I) of what a stack's groups may have on an axis of their own, (T, G, B / G, I)."""
    return x.flatten(1, 2) if x.dim() == 4 else x


def hidden_size(cell: Cell, layer: Layer) -> int:
    """H, from whichever tensor tells."""
    weight_ih, weight_hh, _, _, *params = layer.weights
    for weight, gates in ((weight_ih, cell.layout.of_x), (weight_hh, cell.layout.of_h)):
        if weight is not None:
            return int(weight.shape[-2] // len(gates))
    return int(next(a for a in (*layer.states, *params, *layer.inputs) if a is not None).shape[-1])


def given_states(cell: Cell, layer: Layer) -> tuple[Tensor, ...]:
    """The initial states, or where there are none zeros, one row for all; with a projection they differ in width."""
    if layer.states[0] is not None:
        return layer.states
    rows, weight_hh, H = flat_input(layer.x).shape[1], layer.weights[1], hidden_size(cell, layer)
    widths = [H if weight_hh is None else weight_hh.shape[-1]] + [H] * (len(cell.states) - 1)
    zeros = {width: layer.x.new_zeros(1, width).expand(rows, -1) for width in widths}
    return tuple(zeros[width] for width in widths)


def step_order(T: int, reverse: bool) -> range:
    """The order in which the time steps run."""
    return range(T - 1, -1, -1) if reverse else range(T)


def before(a: Tensor, a_0: Tensor, layer: Layer, held: Optional, reset: Optional) -> Tensor:
    """What each step starts from: the states (T, B, H) of the step before, `a_0` in the first, zeros after a reset.

    `held` marks the steps whose states are not in `a`. A row that runs backwards starts after these, from `a_0`.
    """
    if held is not None:
        a = torch.where(held, a_0, a)
    first = a_0.unsqueeze(0)
    a = torch.cat([a[1:], first] if layer.reverse else [first, a[:-1]])
    return fill(a, reset)
