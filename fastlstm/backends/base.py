"""The records that pass between a module and a backend, and the traits by which a backend describes itself.

T, B, I and H are the numbers of time steps, batch rows, inputs and hidden units. Fields that are tuples have one entry
for each weight, state or input, in the order of `Layer`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastlstm.cells.spec import Cell

Optional = Tensor | None
WEIGHTS = 4  # weight_ih, weight_hh, bias_ih and bias_hh, after which a cell's params come


class Layer(NamedTuple):
    """One layer in one direction, or all layers and directions of a module: the arguments of a run.

    Attributes:
        x: (T, B, I), any strides. For a stack of G layers it may also be (T, G, B / G, I).
        weights: weight_ih (X H, I) for a cell with X gates that sum x, weight_hh (Y H, H / K) for its Y gates that sum
            h, bias_ih (X H,) and bias_hh (Y H,), and then the cell's params (H,). Blocks of rows are in the order of
            the cell's gates. After the params come the weights (H, H / K) of the cell's products. A bias may be None,
            and so may a weight that no gate of the cell sums. K is the number of heads, mostly 1: a unit sees only the
            H / K units of its own head, of h and of what products multiply. The weights of a stack of G layers have a
            leading axis of G, and each layer has an equal share of the batch rows. Where the cell's only product is its
            first state, a layer may be *projected*: that weight is (P, H), h is (B, P), and weight_hh has P columns.
        states: the initial states (B, H) in the cell's order, h_0 first, or only Nones for zeros.
        lengths: int64 (B,), on the device of x, or None. Row b is *held* at step t if t >= lengths[b], in either
            direction: its states are carried through, and its output is zero.
        reset: bool (T, B), on the device of x, or None. The states are zero before the steps that are True, unless the
            step is held.
        reverse: the steps run from the last to the first. Results stay in the order of x.
        cell: what one step computes.
        inputs: (T, B, H) for each of the cell's inputs.
        scales: float32 (X H,) of weight_ih and (Y H,) of weight_hh, if these are int8, or (). A weight row is its
            numbers times its scale.
        activations: 8 or 16, the bits of the numbers that rows of x and h are rounded to beside int8 weights, or 0.
        stacked: whether the caller means a stack: without it a leading axis of the weights is an error of the caller's.
        layers, directions: how many layers there are, of which each reads the output of the one before, and in how many
            directions each runs, 1 or 2. Layer n in direction d is *part* n * directions + d. The weights of all parts
            follow each other in this order, and the states are (parts, B, H). The second direction is the reverse one,
            and the output of a layer has the outputs of its directions side by side.
    """

    x: Tensor
    weights: tuple[Any, ...]
    states: tuple[Any, ...]
    lengths: Optional
    reset: Optional
    reverse: bool
    cell: Cell
    inputs: tuple[Any, ...] = ()
    scales: tuple[Any, ...] = ()
    activations: int = 0
    stacked: bool = False
    layers: int = 1
    directions: int = 1

    def to(self, dtype: torch.dtype) -> "Layer":
        """Return the layer with its floating-point tensors in another type."""
        weights, states, inputs = (
            tuple(None if a is None else a.to(dtype) for a in each) for each in (self.weights, self.states, self.inputs)
        )
        return self._replace(x=self.x.to(dtype), weights=weights, states=states, inputs=inputs)

    def squeezed(self, has_layer_axis: bool) -> "Layer":
        """Return the layer with an axis of steps in x, and without an axis of layers in the states if they have one."""
        x = self.x if self.x.dim() != 2 else self.x.unsqueeze(0)
        return self._replace(
            x=x, states=tuple(a.squeeze(0) if has_layer_axis and a is not None else a for a in self.states)
        )

    @property
    def parts(self) -> int:
        """The number of layers times directions."""
        return self.layers * self.directions

    def part(self, k: int, x: Tensor) -> "Layer":
        """Return part k alone, whose input is `x`."""
        count, states = len(self.weights) // self.parts, tuple([a if a is None else a[k : k + 1] for a in self.states])
        weights, reverse = self.weights[k * count : (k + 1) * count], k % self.directions == 1
        return self._replace(x=x, weights=weights, states=states, reverse=reverse, layers=1, directions=1)

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All tensors of a layer of floats, flat, as autograd's Functions take them."""
        return self.x, *self.weights, *self.states, *self.inputs, self.lengths, self.reset

    @classmethod
    def of(cls, cell: Cell, tensors: Sequence[Any], reverse: bool, layers: int = 1, directions: int = 1) -> "Layer":
        """Return the layer, or layers, of flat `tensors`."""
        x, weights, states, inputs = _cut(cell, tensors[:-2])
        masks = tensors[-2], tensors[-1]
        return new_layer((x, weights, states, *masks, reverse, cell, inputs, (), 0, False, layers, directions))


class Run(NamedTuple):
    """The results of a run. The gradients of the results, which `backward` takes, are a `Run` as well.

    Attributes:
        h: (T, B, H), the outputs, which are the first state: zero at held steps.
        last: the states (B, H) after the last step of each row, in the cell's order.
        saved: () unless it was asked for. The inner states (T, B, H) after each step, where held steps repeat the
            states before them. Then ``gates``, the other saved values, in the backend's own layout. In a `Run` of
            gradients: those of the inner states, each of which may be None, or ().
    """

    h: Any
    last: tuple[Any, ...]
    saved: tuple[Any, ...]

    @property
    def flat(self) -> tuple[Any, ...]:
        """All results in this order: h, the last states, and the saved values."""
        return self.h, *self.last, *self.saved

    @classmethod
    def of(cls, states: int, flat: Sequence[Any]) -> "Run":
        """Return the run of `flat` results, of so many states: h, the last states, and the saved values."""
        return new_run((flat[0], tuple(flat[1 : 1 + states]), tuple(flat[1 + states :])))


class Gradients(NamedTuple):
    """The gradients of a layer's x, weights, states and inputs, None if not wanted; or booleans that say which are."""

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


# These return a record from a tuple of all its fields, in a third of the time that the record's own class takes.
new_layer: Callable[[tuple[Any, ...]], Layer] = partial(tuple.__new__, Layer)
new_run: Callable[[tuple[Any, tuple[Any, ...], tuple[Any, ...]]], Run] = partial(tuple.__new__, Run)
new_gradients: Callable[[tuple[Any, ...]], Gradients] = partial(tuple.__new__, Gradients)


def ranks(cell: Cell) -> tuple[int, ...]:
    """Return how many axes each weight of one layer has: the weights of a stack have one more."""
    return 2, 2, 1, 1, *[1] * len(cell.params), *[2] * len(cell.products)


def stack_size_of(layer: Layer) -> int:
    """Return the number of layers in a stack, or 0 for one layer."""
    for a, rank in zip(layer.weights, ranks(layer.cell)):
        if a is not None:
            return int(a.shape[0]) if a.dim() > rank else 0
    return 0


def count_tensors(cell: Cell) -> int:
    """Return how many tensors a layer of a cell has, lengths and reset among them: see `Layer.tensors`."""
    return 1 + WEIGHTS + len(cell.params) + len(cell.products) + len(cell.states) + len(cell.inputs) + 2


def _cut(cell: Cell, flat: Sequence[Any]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    inputs = len(flat) - len(cell.inputs)
    states = inputs - len(cell.states)
    return flat[0], tuple(flat[1:states]), tuple(flat[states:inputs]), tuple(flat[inputs:])


class Plan(Protocol):
    """How a backend runs calls of one signature: of the same shapes, types, and settings. The strides of x, the inputs,
    lengths and reset are the same too. Each weight and each state is contiguous in all of these calls or in none, and
    its strides may differ otherwise. In the backward pass tensors may lie in yet another way, since hooks of saved
    tensors may have moved them.

    The layers of a plan may differ from those of `forward` and `backward` in two ways. The states may be (1, B, H), and
    then those of the run and their gradients are so too. And x may be (B, I), for one step alone: then ``h`` is None.

    Attributes:
        backend: its name, which whoever made the plan sets.
        types: of what the backward pass reads, from the first run with gradients on; before it None, which whoever
            made the plan sets.
        saves_sequences: whether the saved values are states (T, B, H) of all steps in the layer's type, and after them
            the gates of each part. Otherwise only the plan's own backward pass reads them. The states are, layer
            by layer, its output, unless this is the run's ``h``, and the inner states of each direction.
        reads_h: whether the backward pass reads the run's ``h``.
        accumulates: whether `backward` can add to gradients of the weights.
        known: what is known of earlier backward passes, which whoever made the plan sets to an empty dictionary.
        loop: what gathers the gradients of weights of several runs, or None. Whoever made the plan sets it.
    """

    backend: str
    types: Any
    saves_sequences: bool
    reads_h: bool
    accumulates: bool
    known: dict[Any, Any]
    loop: Any

    def forward(self, layer: Layer) -> Run: ...

    def backward(self, grads: Run, layer: Layer, run: Run, needs: Gradients, form: list[Any]) -> Gradients:
        """`form`: an empty list, or that of an earlier call with tensors of these types, shapes and strides. The plan
        may keep there what all such calls need.

        A plan that accumulates takes `sums` as well: gradients of the weights, None where not wanted, to which it adds
        those of this call. The result has None in their place.
        """
        ...


@dataclass(frozen=True)
class Traits:
    """What a backend can do beyond `forward` and `backward` of float32 layers. A misspelt trait fails at the import.

    Attributes:
        takes_sixteen_bits: `forward` and `backward` take bfloat16 and float16. Without it they get float32 copies.
        plans: it has `plan`, which prepares calls of one signature and keeps weights packed from call to call.
        plans_sixteen_bits: `plan` takes layers of bfloat16 and float16, and weights that autocast would cast to them.
        sorts_lengths: it is faster if the longest rows come first.
        prepares_steps: it has `steps`, which prepares single steps of a layer of float32 or float64 for a stream.
        heads: it runs layers of several heads, see `Layer`.
        plans_many: `plan` takes stacks, and several layers and directions, of more than 16 bits.
        stack_rank: how many axes the saved values of a stack have, if the first is that of its layers. With 0 they have
            one layer's axes, of which the last but one is that of batch rows.
        products: it runs cells that multiply values of the step itself.
        projections: it runs projected layers, see `Layer`.
        cells: the keys of the cells that it runs, or None if it runs any.
    """

    takes_sixteen_bits: bool = False
    plans: bool = False
    plans_sixteen_bits: bool = False
    sorts_lengths: bool = False
    prepares_steps: bool = False
    heads: bool = False
    plans_many: bool = False
    stack_rank: int = 0
    products: bool = False
    projections: bool = False
    cells: tuple[str, ...] | None = None


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


def flat_input(x: Tensor) -> Tensor:
    """Return ``x`` as (T, B, I), if the layers of a stack have an axis of their own: (T, G, B / G, I)."""
    return x.flatten(1, 2) if x.dim() == 4 else x


def fill(a: Tensor, where: Optional) -> Tensor:
    """Return `a` with zeros where a mask is True, or as it is if there is no mask."""
    return a if where is None else a.masked_fill(where, 0)


def active_input(layer: Layer, held: Optional) -> Tensor:
    """Return x (T, B, I) for products of torch's: zero at the steps that `held` marks. Padding may be NaN, which zero
    does not cancel, and which oneDNN's products of bfloat16 leak into the row before it on processors with AMX.
    """
    return fill(flat_input(layer.x), held)


def empty_run(layer: Layer) -> Run:
    """Return the run of a layer of no steps or no rows, with its inner states."""
    states = given_states(layer)
    h, *others = (a.expand(layer.x.shape[0], -1, -1).clone() for a in states)
    return Run(h, tuple(a.clone() for a in states), tuple(others))


def hidden_size(layer: Layer) -> int:
    """Return H, from the first tensor that has it."""
    weight_ih, weight_hh, _, _, *params = layer.weights
    for weight, gates in ((weight_ih, layer.cell.gates_of_x), (weight_hh, layer.cell.gates_of_h)):
        if weight is not None:
            return int(weight.shape[-2] // gates)
    if layer.cell.products:
        return int(params[-1].shape[-2])  # whose last axis has the H / K units of a head
    return int(next(a for a in (*layer.states, *params, *layer.inputs) if a is not None).shape[-1])


def output_size(layer: Layer) -> int:
    """Return how many units the first state has: P in a projected layer, otherwise H."""
    return int(layer.weights[-1].shape[-2]) if layer.cell.has_projection else hidden_size(layer)


def heads_of(layer: Layer) -> int:
    """Return the number of heads K of a layer, from the H / K columns of weight_hh, or of a product's weight."""
    weight = layer.weights[-1 if layer.cell.products else 1]
    return 1 if weight is None else int(hidden_size(layer) // weight.shape[-1])


def given_states(layer: Layer) -> tuple[Tensor, ...]:
    """Return the initial states, or zeros expanded from one row."""
    if layer.states[0] is not None:
        return layer.states
    rows, H = flat_input(layer.x).shape[1], hidden_size(layer)
    first = layer.x.new_zeros(1, output_size(layer)).expand(rows, -1)
    other = first if first.shape[1] == H else layer.x.new_zeros(1, H).expand(rows, -1)
    return first, *[other] * (len(layer.states) - 1)
