"""A layer linearized around a finished run: its tangents, its gradients, and how the gradients change.

This is plain PyTorch, and itself differentiable. Everything that follows from the run's ``h`` and ``c`` is computed for
all steps at once. Two loops over time remain, with one product and a few elementwise operations a step. Weights may be
stacks, as in `reference`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.backends.base import (
    Gradients,
    Layer,
    flat_input,
    given_states,
    held_steps,
    reset_steps,
    sum_of_biases,
    wants_bias,
)
from fastlstm.backends.reference import add_bias, before, bias_gradient, linear, step_order, weight_gradient
from fastlstm.cell import cell_curvature, cell_slopes

Optional = Tensor | None


def _sum(*terms: Optional) -> Optional:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def _fill(a: Tensor, where: Optional) -> Tensor:
    return a if where is None else a.masked_fill(where, 0)


class WeightTangents(NamedTuple):
    """Tangents of a layer's parameters. None stands for zero."""

    ih: Optional
    hh: Optional
    bias: Optional


class Linearized:
    """The derivatives of one layer in one direction, around the ``h`` and ``c`` (T, B, H) that a run left."""

    def __init__(self, layer: Layer, h: Tensor, c: Tensor) -> None:
        self.layer, (self.weight_ih, self.weight_hh, *_) = layer, layer.weights
        self.bias, self.h_0, self.c_0 = sum_of_biases(layer), *given_states(layer)
        self.order = step_order(h.shape[0], layer.reverse)
        self.held = held_steps(layer)
        self.reset = reset_steps(layer, self.held)
        self.x = _fill(flat_input(layer.x), self.held)  # padding may be NaN
        self.h_prev, self.c_prev = self.h_before(h, self.h_0), self.c_before(c, self.c_0)
        preact = add_bias(linear(self.x, self.weight_ih) + linear(self.h_prev, self.weight_hh), self.bias)
        i, f, g, o = preact.chunk(4, -1)
        self.gates = i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        slopes, c_to_h = cell_slopes(i, f, g, o, self.c_prev)
        self.slopes, self.c_to_h = _fill(torch.cat(slopes, -1), self.held), _fill(c_to_h, self.held)
        self.carried = _fill(f, self.reset)  # factor of c_prev in c: f; 0 after a reset; 1 at held steps
        if self.held is not None:
            self.carried = self.carried.masked_fill(self.held, 1)

    def h_before(self, h: Tensor, h_0: Optional) -> Tensor:
        """Return the h that each step starts from, for outputs `h` (T, B, H) and `h_0` or zeros: 0 at held steps."""
        h_0 = torch.zeros_like(h[0]) if h_0 is None else h_0
        return _fill(before(h, h_0, self.layer, self.held, self.reset), self.held)

    def c_before(self, c: Tensor, c_0: Optional) -> Tensor:
        """Return the c that each step starts from. Unlike `h`, `c` repeats the state before it at held steps."""
        c_0 = torch.zeros_like(c[0]) if c_0 is None else c_0
        return _fill(before(c, c_0, self.layer, None, self.reset), self.held)

    def h_after(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the transpose of `h_before`. Return the parts of the outputs (T, B, H) and of h_0."""
        h, h_0 = self.c_after(seen)
        if self.held is None:
            return h, h_0
        return _fill(h, self.held), h_0 + _fill(h, ~self.held).sum(0)

    def c_after(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the transpose of `c_before`. Return the parts of the cell states (T, B, H) and of c_0."""
        seen = _fill(_fill(seen, self.reset), self.held)
        none = torch.zeros_like(seen[:1])
        if self.layer.reverse:
            return torch.cat([none, seen[:-1]]), seen[-1]
        return torch.cat([seen[1:], none]), seen[0]

    def outputs(self, h: Tensor) -> Tensor:
        """Return hidden states (T, B, H) as the layer outputs them: zero at held steps."""
        return _fill(h, self.held)

    def _steps(self, *tensors: Optional) -> list[tuple[Any, ...]]:
        """Return the tensors of each time step. unbind's derivative is one stack, but indexing's is T zero tensors."""
        T = self.x.shape[0]
        return list(zip(*([None] * T if a is None else a.unbind(0) for a in tensors)))

    def preact_tangent(self, x: Optional, weights: WeightTangents, h_prev: Optional) -> Tensor:
        """Return the tangent of the pre-activations (T,B,4H), from tangents of x, the weights and h_prev (T,B,H)."""
        total = _sum(
            None if x is None else linear(_fill(x, self.held), self.weight_ih),
            None if weights.ih is None else linear(self.x, weights.ih),
            None if weights.hh is None else linear(self.h_prev, weights.hh),
            None if h_prev is None else linear(h_prev, self.weight_hh),
        )
        return add_bias(torch.zeros_like(self.slopes) if total is None else total, weights.bias)

    def tangent(self, preact: Tensor, h: Optional, c: Optional) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tangents of the pre-activations, of h and of c. Held steps repeat the tangents before them.

        `preact` is `preact_tangent` without h_prev. `h` and `c` are the tangents of h_0 and c_0, or None for zeros.
        """
        h, c = (torch.zeros_like(self.c_prev[0]) if a is None else a for a in (h, c))
        steps = self._steps(preact, self.slopes, self.c_to_h, self.carried, self.reset, self.held)
        results: list[tuple[Tensor, Tensor, Tensor]] = [(preact, h, c)] * len(steps)
        for t in self.order:
            preact_t, slopes, c_to_h, carried, reset, held = steps[t]
            preact_t = preact_t + linear(_fill(h, reset), self.weight_hh)
            *to_c, to_h = (preact_t * slopes).chunk(4, -1)
            c = carried * c + to_c[0] + to_c[1] + to_c[2]
            h_new = c_to_h * c + to_h
            h = h_new if held is None else torch.where(held, h, h_new)
            results[t] = preact_t, h, c
        preacts, hs, cs = zip(*results)
        return torch.stack(preacts), torch.stack(hs), torch.stack(cs)

    def gradient(self, dh: Optional, dh_n: Optional, dc_n: Optional, dc: Optional) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``dpreact`` (T,B,4H), and the gradients of h and c (T,B,H), with all that later steps add to them."""
        zeros, dh = torch.zeros_like(self.c_prev[0]), None if dh is None else _fill(dh, self.held)
        dh_t, dc_t = zeros if dh_n is None else dh_n, zeros if dc_n is None else dc_n
        steps = self._steps(dh, dc, self.slopes, self.c_to_h, self.carried, self.reset, self.held)
        results: list[tuple[Tensor, Tensor, Tensor]] = [(zeros, zeros, zeros)] * len(steps)
        for t in reversed(self.order):
            dh_out, dc_out, slopes, c_to_h, carried, reset, held = steps[t]
            dh_t = dh_t if dh_out is None else dh_t + dh_out
            dc_t = dc_t if dc_out is None else dc_t + dc_out
            dc_t = torch.addcmul(dc_t, dh_t, c_to_h)
            dpreact = slopes * torch.cat([dc_t, dc_t, dc_t, dh_t], -1)
            results[t] = dpreact, dh_t, dc_t
            dh_prev = linear(dpreact, self.weight_hh.mT)
            dh_t = _fill(dh_prev if held is None else torch.where(held, dh_t, dh_prev), reset)
            dc_t = carried * dc_t
        dpreacts, dhs, dcs = zip(*results)
        return torch.stack(dpreacts), torch.stack(dhs), torch.stack(dcs)

    def curvature(self, dh: Tensor, dc: Tensor, preact: Tensor, c_prev: Tensor) -> tuple[Tensor, Tensor]:
        """Return how ``dpreact`` (T,B,4H) and the gradient of ``c_prev`` (T,B,H) change along tangents of the
        pre-activations and of ``c_prev``. `dh` and `dc` are the results of `gradient`, and held fixed.
        """
        i, f, g, o = preact.chunk(4, -1)
        changes, of_c_prev = cell_curvature(dh, dc, *self.gates, self.c_prev, (i, f, g, o), c_prev)
        return _fill(torch.cat(changes, -1), self.held), of_c_prev

    def products(
        self,
        change: Tensor,
        dpreact: Tensor,
        x: Optional,
        weights: WeightTangents,
        h_prev: Optional,
        wanted: Gradients,
    ) -> tuple[Optional, Optional, Optional, Optional, Tensor]:
        """Return how the gradients of x, weight_ih, weight_hh, bias and h_prev change.

        Each is a product of dpreact with x, h_prev or a weight. By the product rule its change is `change`, which is
        that of dpreact, times the other factor, plus dpreact times the other factor's tangent.
        """

        def transposed(weight: Tensor, tangent: Optional) -> Tensor:
            result = linear(change, weight.mT)
            return result if tangent is None else result + linear(dpreact, tangent.mT)

        def outer(inputs: Tensor, tangent: Optional, weight: Tensor) -> Tensor:
            result = weight_gradient(change, inputs, weight)
            return result if tangent is None else result + weight_gradient(dpreact, tangent, weight)

        seen = None if x is None else _fill(x, self.held)
        return (
            transposed(self.weight_ih, weights.ih) if wanted.x else None,
            outer(self.x, seen, self.weight_ih) if wanted.weights[0] else None,
            outer(self.h_prev, h_prev, self.weight_hh) if wanted.weights[1] else None,
            bias_gradient(change, self.bias) if wants_bias(wanted) and self.bias is not None else None,
            transposed(self.weight_hh, weights.hh),
        )
