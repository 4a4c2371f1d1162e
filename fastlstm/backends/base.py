"""What passes between a module and a backend, and what a backend says of itself.

T, B, I and H are the numbers of time steps, batch rows, inputs and hidden units. Fields that are tuples have one entry
for each of the cell's weights or states, in the cell's order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Optional = Tensor | None


class Layer(NamedTuple):
    """One layer in one direction: what goes into a run.

    Attributes:
        x: (T, B, I), any strides. For a stack of G layers it may also be (T, G, B / G, I).
        weights: weight_ih (4H, I), weight_hh (4H, H), and bias_ih and bias_hh (4H,), each of which may be None. A stack
            of G layers has them with a leading axis of G, and its batch rows lie in G equal groups.
        states: h_0 and c_0 (B, H), or None twice for zeros.
        lengths: int64 (B,), on the device of x, or None. Row b is *held* at step t if t >= lengths[b], in either
            direction: its states are carried through, and its output is zero.
        reset: bool (T, B), on the device of x, or None. The states are zero before the steps that are True, unless the
            step is held.
        reverse: the steps run from the last to the first. Results stay in the order of x.
    """

    x: Tensor
    weights: tuple[Any, ...]
    states: tuple[Any, ...]
    lengths: Optional
    reset: Optional
    reverse: bool

    def to(self, dtype: torch.dtype) -> "Layer":
        """The layer with its floating-point tensors in another type."""
        weights, states = (
            tuple(None if a is None else a.to(dtype) for a in each) for each in (self.weights, self.states)
        )
        return self._replace(x=self.x.to(dtype), weights=weights, states=states)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All operands, flat, as autograd's Functions take them: see `OPERANDS`."""
        return self.x, *self.weights, *self.states, self.lengths, self.reset

    @classmethod
    def of(cls, tensors: Sequence[Any], reverse: bool) -> "Layer":
        """The inverse of `tensors`."""
        x, w_ih, w_hh, b_ih, b_hh, h_0, c_0, lengths, reset = tensors
        return cls(x, (w_ih, w_hh, b_ih, b_hh), (h_0, c_0), lengths, reset, reverse)


class Run(NamedTuple):
    """What comes out of a run. The gradients of these, as `backward` takes them, are a `Run` as well.

    Attributes:
        h: (T, B, H), the outputs: zero at held steps.
        last: h_n and c_n (B, H), the states after the last step of each row.
        kept: c (T, B, H), the cell states after each step, of which held steps repeat the one before, and ``gates`` in
            the backend's own layout. Empty unless they were asked for. Of gradients: that of c, or nothing.
    """

    h: Any
    last: tuple[Any, ...]
    kept: tuple[Any, ...]


class Gradients(NamedTuple):
    """The gradients of a layer's x, weights and states, each None where it is not wanted; or which are wanted."""

    x: Any
    weights: tuple[Any, ...]
    states: tuple[Any, ...]

    @property
    def flat(self) -> tuple[Any, ...]:
        """All of them in the order of `Layer.tensors`, of which the last two have no gradient."""
        return self.x, *self.weights, *self.states

    @classmethod
    def of(cls, flat: Sequence[Any]) -> "Gradients":
        """The inverse of `flat`."""
        x, w_ih, w_hh, b_ih, b_hh, h_0, c_0 = flat
        return cls(x, (w_ih, w_hh, b_ih, b_hh), (h_0, c_0))


# The operands of a layer and what a run keeps, as a schema of torch.library writes them: the one list of their names.
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
    """What a backend can do beyond `forward` and `backward` of float32 layers. A name that is not here is an error when
    the backend is imported.

    Attributes:
        takes_sixteen_bits: `forward` and `backward` take tensors of bfloat16 and float16. Otherwise they get float32.
        plans: it has `plan`, which prepares calls of one signature and keeps weights packed from call to call.
        plans_sixteen_bits: `plan` takes layers of bfloat16 and float16, and weights that autocast would cast to these.
        sorts_lengths: it is faster where the rows that last longest come first.
    """

    takes_sixteen_bits: bool = False
    plans: bool = False
    plans_sixteen_bits: bool = False
    sorts_lengths: bool = False


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


def sum_of(first: Optional, second: Optional) -> Optional:
    """The sum of two tensors of which either may be absent, and then counts as zero."""
    return second if first is None else first if second is None else first + second


def sum_of_biases(layer: Layer) -> Optional:
    """bias_ih + bias_hh, where a layer has any."""
    return sum_of(*layer.weights[2:])


def wants_bias(needs: Gradients) -> bool:
    """Whether a gradient of either bias is wanted."""
    return any(needs.weights[2:])


def bias_gradients(dbias: Optional, needs: Gradients) -> tuple[Optional, Optional]:
    """The gradient of their sum to each bias that wants it: a tensor of its own, since what is done to one in place is
    not to be done to the other's.
    """
    to_ih, to_hh = needs.weights[2:]
    second = dbias if to_hh else None
    return dbias if to_ih else None, second.clone() if second is not None and to_ih else second


def flat_input(x: Tensor) -> Tensor:
    """(T, B, I) of what a stack's groups may have on an axis of their own, (T, G, B / G, I)."""
    return x.flatten(1, 2) if x.dim() == 4 else x


def given_states(layer: Layer) -> tuple[Tensor, ...]:
    """The initial states, or where there are none zeros, one row for all; with a projection they differ in width."""
    if layer.states[0] is not None:
        return layer.states
    rows, (H4, P) = flat_input(layer.x).shape[1], layer.weights[1].shape[-2:]
    zeros = layer.x.new_zeros(1, P).expand(rows, -1)
    return zeros, zeros if H4 == 4 * P else layer.x.new_zeros(1, H4 // 4).expand(rows, -1)


def check_layer(layer: Layer, weight_hr: Optional = None) -> None:
    """Raise unless the tensors make one layer in one direction.

    Args:
        layer: weights of one layer, not of a stack.
        weight_hr: (P, H), with which h_0 is (B, P) and weight_hh (4H, P).

    Raises:
        ValueError: naming the argument, the shape, dtype or device it must have, and the one it has.
    """
    x, (weight_ih, weight_hh, bias_ih, bias_hh), (h_0, c_0), lengths, reset, _ = layer
    if x.dim() != 3:
        raise ValueError(f"x must have shape (T, B, I), got {tuple(x.shape)}")
    T, B, I = x.shape
    rows = weight_ih.shape[0]
    hidden, odd = rows // 4, rows % 4  # dynamo has no divmod of symbols
    if odd or weight_ih.dim() != 2 or weight_ih.shape[1] != I:
        raise ValueError(f"weight_ih must have shape (4H, I) with I = {I}, got {tuple(weight_ih.shape)}")
    if rows == 0:
        raise ValueError(f"weight_ih must have shape (4H, I) with H of 1 or more, got {tuple(weight_ih.shape)}")
    out = hidden if weight_hr is None else weight_hr.shape[0]
    # no `strict` for `zip`: Dynamo of torch 2.9 takes any for true
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
