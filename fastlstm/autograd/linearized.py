"""A layer linearized around a run: tangents forward, gradients backward, and how gradients change along tangents.

It is plain PyTorch, and itself differentiable. The partial derivatives of each new state by all arguments of a step are
computed for all steps at once. The two loops over time then have one product and a few elementwise operations a step.
Weights may be stacks, as in `reference`.

A step that takes M means over units has M results more, in front of its N states. These are the values of which the
means are taken. They have partial derivatives by the arguments of the step, as states have, and all later results also
have a partial derivative by each mean. A mean is its own adjoint: the gradient of the value is the mean of the gradient
of its mean, to which only later results contribute.

An argument with the name of a value, such as `h_prev`, is the tangent or the gradient of that value in this file. A
suffix `_t` stands for a tangent, and never for a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import (
    WEIGHTS,
    Gradients,
    Layer,
    Run,
    fill,
    flat_input,
    given_states,
    heads_of,
    held_steps,
    hidden_size,
    reset_steps,
    sum_of,
)
from fastlstm.backends.reference import previous, step_order
from fastlstm.backends.sums import Sums, for_rows, vector_gradient
from fastlstm.cells.graph import HEADS
from fastlstm.cells.on_tensors import mean_of_head

Optional = Tensor | None
Several = Sequence[Optional]


def _combined(partials: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Return the sum of the products of partial derivatives and values."""
    total = partials[0] * values[0]
    for partial, a in zip(partials[1:], values[1:]):
        total = torch.addcmul(total, partial, a)
    return total


Tangents = Gradients  # tangents of a layer's operands, each None for zeros


class Linearized:
    """The derivatives of one layer in one direction, around a run of it.

    Args:
        states: the outputs of the run, and then its inner states, (T, B, H) each.
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
        self.prev = self.previous(states, given_states(layer))
        self.zeros = torch.zeros_like(self.prev[0])
        preact = self.sums.add_h(self.sums.start(self.x), self.prev[0])
        self.values = {
            **self.sums.split(preact),
            **dict(zip([f"{name}_prev" for name in cell.states], self.prev)),
            **self._beside_states(layer, ""),
            HEADS: heads_of(layer),
        }
        self.carried = [cell.states.index(name) for name in cell.layout.carried]
        self.partials = {
            name: partial if isinstance(partial, Tensor) else self.zeros + partial
            for name, partial in cell.derived().jacobian(self.values).items()
        }
        means = self.means = cell.derived().means
        self.names = *means, *cell.states
        moving = [f"{gate}_pre" for gate in cell.layout.preacts] + [f"{name}_prev" for name in cell.layout.carried]
        self.jacobian = [  # of each result, (T, B, S + C, H) for S pre-activations and C carried states
            torch.stack([self.partial(result, name) for name in moving], -2) for result in self.names
        ]
        self.by_mean = [[self.partial(result, mean) for result in self.names] for mean in means]  # (T, B, H) each

    def mean(self, k: int, a: Tensor) -> Tensor:
        """Return the k-th mean of a value (..., H), in this shape or one that broadcasts to it."""
        of_head = [*self.means.values()][k] == "mean_of_head"
        return mean_of_head(a, heads_of(self.layer)) if of_head else a.mean(-1, keepdim=True)

    def partial(self, result: str, name: str) -> Tensor:
        """Return the partial derivative of a result by an argument or a mean, (T, B, H)."""
        return self.partials.get(f"{result}_by_{name}", self.zeros)

    def previous(self, states: Sequence[Tensor], first: Several) -> tuple[Tensor, ...]:
        """Return the states before each step, (T, B, H), from the states after each step.

        Each of `first`, the states before the first step, may be None for zeros. States before a held step count as
        zero. Among `states`, the output is zero at held steps, and the others are there what they were before.
        """
        results = []
        for k, (a, a_0) in enumerate(zip(states, first)):
            a_0 = torch.zeros_like(a[0]) if a_0 is None else a_0
            results.append(fill(previous(a, a_0, self.layer, None if k else self.held, self.reset), self.held))
        return tuple(results)

    def previous_transposed(self, gradients: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Apply the transpose of `previous` to the gradients of the states before each step.

        Return the gradients of the states after each step, (T, B, H), and of those before the first step, (B, H).
        """
        states, first = [], []
        for k, a in enumerate(gradients):
            a = fill(fill(a, self.reset), self.held)
            none = torch.zeros_like(a[:1])
            a, a_0 = (torch.cat([none, a[:-1]]), a[-1]) if self.layer.reverse else (torch.cat([a[1:], none]), a[0])
            if k == 0 and self.held is not None:
                a, a_0 = fill(a, self.held), a_0 + fill(a, ~self.held).sum(0)
            states.append(a)
            first.append(a_0)
        return tuple(states), tuple(first)

    def results(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the results of a run from its states (T, B, H): the outputs, the last states, and the inner states.

        The outputs are zero at held steps.
        """
        return fill(states[0], self.held), *(a[self.order[-1]].clone() for a in states), *states[1:]

    def _steps(self, *tensors: Optional) -> list[tuple[Any, ...]]:
        """Return the tensors of each time step.

        They are split by unbind, whose derivative is one stack. T indices would have T tensors of full size as theirs.
        """
        return list(zip(*([None] * self.T if a is None else a.unbind(0) for a in tensors)))

    def _beside_states(self, of: Layer | Tangents, suffix: str) -> dict[str, Tensor]:
        """Return params and inputs, or tangents of them, (T, B, H), by their names in derived functions."""
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
        """Return the tangents of the pre-activations (T, B, S H), from those of x, the weights and `h_prev`."""
        weight_tangents = Sums(self.cell, operand_tangents.weights, self.H)
        total = weight_tangents.start(self.x)
        if operand_tangents.x is not None:
            total = total + self.sums.multiply(fill(flat_input(operand_tangents.x), self.held))
        return self.sums.add_h(weight_tangents.add_h(total, self.prev[0]), h_prev)

    def tangent(self, preact: Tensor, operand_tangents: Tangents) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the tangents of the pre-activations (T, B, S H) and of all states (T, B, H).

        `preact` is what `preact_tangent` returns without h_prev. Held steps repeat the tangents before them.
        """
        states = [torch.zeros_like(a[0]) if s is None else s for a, s in zip(self.prev, operand_tangents.states)]
        by_mean = [torch.stack(partials, 1) for partials in self.by_mean]  # (T, M + N, B, H) each
        known = preact, torch.stack(self.jacobian, 1), self._beside(operand_tangents), self.reset, self.held, *by_mean
        steps, results = self._steps(*known), []
        for t in self.order:
            start, partials, beside, reset, held, *of_means = steps[t]
            prev = [fill(a, reset) for a in states]
            preact_t = self.sums.add_h(start, prev[0])
            each = torch.cat([preact_t, *(prev[k] for k in self.carried)], -1)
            each = each.reshape(*each.shape[:-1], -1, self.H)  # gradcheck's older vmap has no unflatten
            total = (partials * each).sum(-2)
            total = total if beside is None else total + beside
            for k, of_mean in enumerate(of_means):
                total = torch.addcmul(total, of_mean, self.mean(k, total[k]))
            new = total[len(of_means) :].unbind(0)
            states = [*new] if held is None else [torch.where(held, a, b) for a, b in zip(states, new)]
            results.append((preact_t, *states))
        preact_t, *states = (torch.stack(steps if not self.layer.reverse else steps[::-1]) for steps in zip(*results))
        return preact_t, tuple(states)

    def _beside(self, operand_tangents: Tangents) -> Optional:
        """Return what tangents of params and inputs add to those of the results, (T, M + N, B, H), or None."""
        names = [*self.cell.params, *self.cell.inputs]
        if all(a is None for a in (*operand_tangents.weights[WEIGHTS:], *operand_tangents.inputs)):
            return None
        tangents, rows = self._beside_states(operand_tangents, "_t"), []
        for result in self.names:
            partials = [(self.partials.get(f"{result}_by_{name}"), tangents[f"{name}_t"]) for name in names]
            rows.append(sum((partial * a for partial, a in partials if partial is not None), self.zeros))
        return torch.stack(rows, 1)

    def gradient(self, outputs: Several, last: Several) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return ``dpreact`` (T, B, S H), and the gradients (T, B, H) of each step's new states.

        Args:
            outputs: the gradients of the outputs, and then of the inner states, (T, B, H) each or None.
            last: the gradients of the last states, (B, H) each or None.
        """
        d = [torch.zeros_like(a[0]) if da is None else da for a, da in zip(self.prev, last)]
        first, *others = outputs
        incoming = self._steps(None if first is None else fill(first, self.held), *others)
        S, carried, R = len(self.cell.layout.preacts), len(self.carried), len(self.names)
        of_preacts, of_states = ([a[..., part, :] for a in self.jacobian] for part in (slice(S), slice(S, None)))
        steps, results = self._steps(self.reset, self.held, *of_preacts), []
        carries = self._steps(*(a.select(-2, k) for k in range(carried) for a in of_states))
        by_mean = [self._steps(*partials[k + 1 :]) for k, partials in enumerate(self.by_mean)]
        for t in reversed(self.order):
            reset, held, *partials = steps[t]
            d = [a if out is None else a + out for a, out in zip(d, incoming[t])]
            each = [*d]
            for k in reversed(range(len(by_mean))):  # the last mean first, since it may depend on earlier ones
                each.insert(0, self.mean(k, _combined(by_mean[k][t], each)))
            dpreact = fill(_combined(partials, [a.unsqueeze(-2) for a in each]).flatten(-2), held)
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

    def gradient_changes(
        self, grads: Run, preact: Tensor, prev: Sequence[Tensor], operand_tangents: Tangents, wanted: Gradients
    ) -> tuple[Gradients, tuple[Tensor, ...]]:
        """Return how the gradients of a layer, and of its states after each step (T, B, H), change along tangents of
        the pre-activations `preact` (T, B, S H), of the states `prev` before each step (T, B, H), and of the operands,
        while the gradients `grads` of the results stay fixed.
        """
        cell = self.cell
        dpreact, d = self.gradient((grads.h, *grads.saved), grads.last)
        tangents = cell.derived().curvature({
            **self.values,
            **{f"d{name}": a for name, a in zip(cell.states, d)},
            **{f"{name}_t": a for name, a in self.sums.split(preact).items()},
            **{f"{name}_prev_t": a for name, a in zip(cell.states, prev)},
            **self._beside_states(operand_tangents, "_t"),
        })  # fmt: skip

        def named(names: Sequence[str]) -> tuple[Tensor, ...]:
            return tuple(fill(tangents.get(f"d{name}_t", self.zeros), self.held) for name in names)

        of_gates = named([f"{gate}_pre" for gate in cell.layout.preacts])
        of_preact = torch.cat(of_gates, -1) if of_gates else self.zeros[..., :0]
        of_h_prev, *of_others = named([f"{state}_prev" for state in cell.states])
        weight_tangents, x_t = Sums(cell, operand_tangents.weights, self.H), operand_tangents.x
        x_t = None if x_t is None else fill(flat_input(x_t), self.held)

        biases = self.layer.weights[2:WEIGHTS]
        weights = self.sums.weight_gradients(of_preact, self.x, self.prev[0], wanted.weights, biases)
        others = self.sums.weight_gradients(dpreact, x_t, prev[0], (*wanted.weights[:2], False, False), biases)
        params = (
            vector_gradient(a, param) if want else None
            for a, param, want in zip(named(cell.params), self.layer.weights[WEIGHTS:], wanted.weights[WEIGHTS:])
        )
        by_product = sum_of(self.sums.h_gradient(of_preact), weight_tangents.h_gradient(dpreact))
        of_states, of_first = self.previous_transposed([sum_of(by_product, of_h_prev), *of_others])
        gradients = Gradients(
            sum_of(self.sums.x_gradient(of_preact), weight_tangents.x_gradient(dpreact)) if wanted.x else None,
            (*map(sum_of, weights, others), *params),
            of_first,
            tuple(a if want else None for a, want in zip(named(cell.inputs), wanted.inputs)),
        )
        return gradients, of_states
