"""A layer linearized around a run that has been made: tangents forward, gradients backward, and how those change.

Plain PyTorch, differentiable itself. What the run knows is computed for all steps at once, as the slopes of each new
state by all that a step starts from. The two loops over time are left with one product and a few elementwise operations
a step. Weights may be stacks, as in `reference`.

The means over units that a step takes are M more results, before the N states: slopes say how what a mean is taken of
changes, and how later results change with the mean.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.backends.base import (
    WEIGHTS,
    Gradients,
    Layer,
    fill,
    flat_input,
    given_states,
    heads_of,
    held_steps,
    hidden_size,
    reset_steps,
    sum_of,
)
from fastlstm.backends.reference import before, step_order
from fastlstm.backends.sums import Sums, for_rows, vector_gradient
from fastlstm.cells.graph import HEADS
from fastlstm.cells.on_tensors import mean_of_head

Optional = Tensor | None
Several = Sequence[Optional]


def _combined(slopes: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Return the sum of the products of slopes and values."""
    total = slopes[0] * values[0]
    for slope, a in zip(slopes[1:], values[1:]):
        total = torch.addcmul(total, slope, a)
    return total


Tangents = Gradients  # tangents of a layer's operands, each None for zeros


class Changes(NamedTuple):
    """How a step's gradients change, (T, B, ...) of all steps: of the pre-activations in the order of the sums, and by
    way of the elementwise arithmetic of the states before, params and inputs.
    """

    sums: Tensor
    prev: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]


class Linearized:
    """The derivatives of one layer in one direction, around the states (T, B, H) that a run left: its outputs, then the
    other states.
    """

    def __init__(self, layer: Layer, states: Sequence[Tensor]) -> None:
        cell = layer.cell
        self.cell, self.layer, self.H = cell, layer, hidden_size(layer)
        self.held = held_steps(layer)
        self.reset = reset_steps(layer, self.held)
        self.x = fill(flat_input(layer.x), self.held)  # a padding may be NaN
        self.T, self.B = self.x.shape[:2]
        self.order = step_order(self.T, layer.reverse)
        self.sums = Sums(cell, layer.weights, self.H)
        self.prev = self.before(states, given_states(layer))
        self.zeros = torch.zeros_like(self.prev[0])
        preact = self.sums.add_h(self.sums.start(self.x), self.prev[0])
        self.values = {
            **self.sums.split(preact),
            **dict(zip([f"{name}_prev" for name in cell.states], self.prev)),
            **self._beside_states(layer, ""),
            HEADS: heads_of(layer),
        }
        self.carried = [cell.states.index(name) for name in cell.layout.carried]
        self.slopes = {
            name: slope if isinstance(slope, Tensor) else self.zeros + slope
            for name, slope in cell.derived().jacobian(self.values).items()
        }
        means = self.means = cell.derived().means
        self.names = *means, *cell.states
        moving = [f"{gate}_pre" for gate in cell.layout.preacts] + [f"{name}_prev" for name in cell.layout.carried]
        self.jacobian = [  # of each result, (T, B, S + C, H) for S sums and C carried states
            torch.stack([self.slope(result, name) for name in moving], -2) for result in self.names
        ]
        self.by_mean = [[self.slope(result, mean) for result in self.names] for mean in means]  # (T, B, H) each

    def mean(self, k: int, a: Tensor) -> Tensor:
        """The k-th mean of a value (..., H), in this shape or one that broadcasts to it."""
        of_head = [*self.means.values()][k] == "mean_of_head"
        return mean_of_head(a, heads_of(self.layer)) if of_head else a.mean(-1, keepdim=True)

    def slope(self, result: str, name: str) -> Tensor:
        """What one more of an argument or mean adds to a result, (T, B, H)."""
        return self.slopes.get(f"{result}_by_{name}", self.zeros)

    def before(self, states: Sequence[Tensor], first: Several) -> tuple[Tensor, ...]:
        """What each step saw of states (T, B, H) that start from `first`, each of which may be None for zeros. The
        outputs come first, which are zero at held steps, where the others repeat the state before. A held step saw
        zeros.
        """
        results = []
        for k, (a, a_0) in enumerate(zip(states, first)):
            a_0 = torch.zeros_like(a[0]) if a_0 is None else a_0
            results.append(fill(before(a, a_0, self.layer, None if k else self.held, self.reset), self.held))
        return tuple(results)

    def after(self, seen: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The transpose of `before`: what belongs to the states (T, B, H), and to those that they start from."""
        states, first = [], []
        for k, a in enumerate(seen):
            a = fill(fill(a, self.reset), self.held)
            none = torch.zeros_like(a[:1])
            a, a_0 = (torch.cat([none, a[:-1]]), a[-1]) if self.layer.reverse else (torch.cat([a[1:], none]), a[0])
            if k == 0 and self.held is not None:
                a, a_0 = fill(a, self.held), a_0 + fill(a, ~self.held).sum(0)
            states.append(a)
            first.append(a_0)
        return tuple(states), tuple(first)

    def results(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of states (T, B, H) what a run has: outputs, which are zero at held steps, last states, and others."""
        return fill(states[0], self.held), *(a[self.order[-1]].clone() for a in states), *states[1:]

    def _steps(self, *tensors: Optional) -> list[tuple[Any, ...]]:
        """The tensors of each time step; unbind's derivative is one stack, where indexing's is T zero tensors."""
        return list(zip(*([None] * self.T if a is None else a.unbind(0) for a in tensors)))

    def _beside_states(self, of: Layer | Tangents, suffix: str) -> dict[str, Tensor]:
        """Params and inputs, or tangents of them, (T, B, H), by what derived functions call them."""
        params = {
            f"{name}{suffix}": self.zeros if a is None else for_rows(a, self.B).expand(self.T, -1, -1)
            for name, a in zip(self.cell.params, of.weights[WEIGHTS:])
        }
        inputs = {
            f"{name}{suffix}": self.zeros if a is None else fill(a, self.held)
            for name, a in zip(self.cell.inputs, of.inputs)
        }
        return params | inputs

    def preact_tangent(self, operand_tangents: Tangents, h_prev: Optional) -> Tensor:
        """How the pre-activations (T, B, S H) change along tangents of x, the weights and what each step saw of h."""
        weight_tangents = Sums(self.cell, operand_tangents.weights, self.H)
        total = weight_tangents.start(self.x)
        if operand_tangents.x is not None:
            total = total + self.sums.multiply(fill(flat_input(operand_tangents.x), self.held))
        return self.sums.add_h(weight_tangents.add_h(total, self.prev[0]), h_prev)

    def tangent(self, preact: Tensor, operand_tangents: Tangents) -> tuple[Tensor, tuple[Tensor, ...]]:
        """From `preact_tangent` without the states' part: the tangents of the pre-activations and of all states
        (T, B, H). Held steps repeat the tangents before them.
        """
        states = [torch.zeros_like(a[0]) if s is None else s for a, s in zip(self.prev, operand_tangents.states)]
        by_mean = [torch.stack(slopes, 1) for slopes in self.by_mean]  # (T, M + N, B, H) each
        known = preact, torch.stack(self.jacobian, 1), self._beside(operand_tangents), self.reset, self.held, *by_mean
        steps, results = self._steps(*known), []
        for t in self.order:
            start, slopes, beside, reset, held, *of_means = steps[t]
            prev = [fill(a, reset) for a in states]
            moved = self.sums.add_h(start, prev[0])
            each = torch.cat([moved, *(prev[k] for k in self.carried)], -1)
            each = each.reshape(*each.shape[:-1], -1, self.H)  # gradcheck's older vmap has no unflatten
            total = (slopes * each).sum(-2)
            total = total if beside is None else total + beside
            for k, of_mean in enumerate(of_means):
                total = torch.addcmul(total, of_mean, self.mean(k, total[k]))
            new = total[len(of_means) :].unbind(0)
            states = [*new] if held is None else [torch.where(held, a, b) for a, b in zip(states, new)]
            results.append((moved, *states))
        moved, *states = (torch.stack(steps if not self.layer.reverse else steps[::-1]) for steps in zip(*results))
        return moved, tuple(states)

    def _beside(self, operand_tangents: Tangents) -> Optional:
        """What tangents of params and inputs add to those of the results, (T, M + N, B, H)."""
        names = [*self.cell.params, *self.cell.inputs]
        if all(a is None for a in (*operand_tangents.weights[WEIGHTS:], *operand_tangents.inputs)):
            return None
        tangents, rows = self._beside_states(operand_tangents, "_t"), []
        for result in self.names:
            slopes = [(self.slopes.get(f"{result}_by_{name}"), tangents[f"{name}_t"]) for name in names]
            rows.append(sum((slope * a for slope, a in slopes if slope is not None), self.zeros))
        return torch.stack(rows, 1)

    def gradient(self, outputs: Several, last: Several) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``dpreact`` (T, B, S H), the gradients of the pre-activations, and what they come of: the gradients (T, B, H)
        of each step's new states, by way of `outputs`, `last` and later steps.

        Args:
            outputs: of the outputs, and then of the other states, (T, B, H) each or None.
            last: of the states after the last step, (B, H) each or None.
        """
        d = [torch.zeros_like(a[0]) if da is None else da for a, da in zip(self.prev, last)]
        first, *others = outputs
        incoming = self._steps(None if first is None else fill(first, self.held), *others)
        S, carried, R = len(self.cell.layout.preacts), len(self.carried), len(self.names)
        of_sums, of_states = ([a[..., part, :] for a in self.jacobian] for part in (slice(S), slice(S, None)))
        steps, results = self._steps(self.reset, self.held, *of_sums), []
        carries = self._steps(*(a.select(-2, k) for k in range(carried) for a in of_states))
        by_mean = [self._steps(*slopes[k + 1 :]) for k, slopes in enumerate(self.by_mean)]
        for t in reversed(self.order):
            reset, held, *slopes = steps[t]
            d = [a if out is None else a + out for a, out in zip(d, incoming[t])]
            each = [*d]
            for k in reversed(range(len(by_mean))):  # the gradient of what a mean is taken of is the mean of the mean's
                each.insert(0, self.mean(k, _combined(by_mean[k][t], each)))
            dpreact = fill(_combined(slopes, [a.unsqueeze(-2) for a in each]).flatten(-2), held)
            results.append((dpreact, *d))
            of_prev: list[Optional] = [None] * len(d)
            for j, k in enumerate(self.carried):
                of_prev[k] = _combined(carries[t][j * R : (j + 1) * R], each)
            of_prev[0] = sum_of(self.sums.h_gradient(dpreact), of_prev[0])
            new = [torch.zeros_like(a) if b is None else b for a, b in zip(d, of_prev)]
            new = new if held is None else [torch.where(held, a, b) for a, b in zip(d, new)]
            d = [fill(a, reset) for a in new]
        dpreact, *states = (torch.stack(steps if self.layer.reverse else steps[::-1]) for steps in zip(*results))
        return dpreact, tuple(states)

    def curvature(
        self, d: Sequence[Tensor], preact: Tensor, prev: Sequence[Tensor], operand_tangents: Tangents
    ) -> Changes:
        """How a step's gradients change along tangents of the pre-activations (T, B, S H), of the states `prev` before
        (T, B, H), of params and of inputs, at fixed gradients `d` of the new states, those of `gradient`.
        """
        cell = self.cell
        tangents = cell.derived().curvature({
            **self.values,
            **{f"d{name}": a for name, a in zip(cell.states, d)},
            **{f"{name}_t": a for name, a in self.sums.split(preact).items()},
            **{f"{name}_prev_t": a for name, a in zip(cell.states, prev)},
            **self._beside_states(operand_tangents, "_t"),
        })  # fmt: skip

        def named(names: Sequence[str]) -> tuple[Tensor, ...]:
            return tuple(fill(tangents.get(f"d{name}_t", self.zeros), self.held) for name in names)

        sums = named([f"{gate}_pre" for gate in cell.layout.preacts])
        of_sums = torch.cat(sums, -1) if sums else self.zeros[..., :0]
        return Changes(of_sums, named([f"{s}_prev" for s in cell.states]), named(cell.params), named(cell.inputs))

    def products(
        self, changes: Changes, dpreact: Tensor, operand_tangents: Tangents, h_prev: Optional, wanted: Gradients
    ) -> Gradients:
        """How a layer's gradients change where ``dpreact`` and what else is elementwise change by `changes`, and the
        other factors of products along tangents. In place of the initial states' gradients are those of what each step
        saw.
        """
        moved, x_t = Sums(self.cell, operand_tangents.weights, self.H), operand_tangents.x
        x_t = None if x_t is None else fill(flat_input(x_t), self.held)

        biases = self.layer.weights[2:WEIGHTS]
        weights = self.sums.weight_gradients(changes.sums, self.x, self.prev[0], wanted.weights, biases)
        others = self.sums.weight_gradients(dpreact, x_t, h_prev, (*wanted.weights[:2], False, False), biases)
        params = (
            vector_gradient(a, param) if want else None
            for a, param, want in zip(changes.params, self.layer.weights[WEIGHTS:], wanted.weights[WEIGHTS:])
        )
        by_product = sum_of(self.sums.h_gradient(changes.sums), moved.h_gradient(dpreact))
        return Gradients(
            sum_of(self.sums.x_gradient(changes.sums), moved.x_gradient(dpreact)) if wanted.x else None,
            (*map(sum_of, weights, others), *params),
            (changes.prev[0] if by_product is None else by_product + changes.prev[0], *changes.prev[1:]),
            tuple(a if want else None for a, want in zip(changes.inputs, wanted.inputs)),
        )
