"""The products of a layer, and how they add up to a cell's pre-activations.

All functions are differentiable and take weights of one layer, (N, K), or of a stack of G of them, (G, N, K), which
have equal shares of the batch rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.cells.layout import Layout
from fastlstm.cells.on_tensors import of_heads, product
from fastlstm.cells.spec import Cell

Optional = Tensor | None


def dense(weight: Tensor, H: int) -> Tensor:
    """Return the weights (..., Y H, H / K) of heads as (..., Y H, H), zero where a unit does not see another."""
    heads = torch.arange(H, device=weight.device) // weight.shape[-1]
    blocks = weight.unflatten(-2, (-1, H))
    blocks = torch.cat([blocks] * (H // weight.shape[-1]), -1)
    return blocks.masked_fill(heads.unsqueeze(-1) != heads, 0).flatten(-3, -2)


def add_bias(preact: Tensor, bias: Optional) -> Tensor:
    """Add a bias (N,) to every row, or row g of (G, N) to the rows of layer g."""
    if bias is None:
        return preact
    if bias.dim() == 1:
        return preact + bias
    return (preact.unflatten(-2, (bias.shape[0], -1)) + bias.unsqueeze(-2)).flatten(-3, -2)


def for_rows(vector: Tensor, rows: int) -> Tensor:
    """Return a vector (H,), or those (G, H) of a stack, for each of its rows: (B, H)."""
    if vector.dim() == 1:
        return vector.expand(rows, -1)
    stack, H = vector.shape
    return vector.unsqueeze(1).expand(stack, rows // stack, H).flatten(0, 1)


def rows_of(a: Tensor, stack: int) -> Tensor:
    """Return (T, B, N) as (T B, N), or, for a stack of G layers, as (G, T B / G, N). 0 is no stack."""
    if stack:
        return a.unflatten(1, (stack, -1)).transpose(0, 1).flatten(1, 2)
    T, B, N = a.shape
    return a.reshape(T * B, N)


def weight_gradient(dpreact: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return the sum over rows of outer products of ``dpreact`` and ``inputs``, for each layer and head of `weight`."""
    if weight.shape[-1] < inputs.shape[-1]:
        return of_heads("...gbki,...gbyko->gykoi", inputs, dpreact, weight, inputs.shape[-1]).reshape(weight.shape)
    stack = weight.shape[0] if weight.dim() == 3 else 0
    return rows_of(dpreact, stack).mT @ rows_of(inputs, stack)


def vector_gradient(terms: Tensor, vector: Tensor) -> Tensor:
    """Return the sum of (T, B, N) over steps and rows, for each layer if `vector`, a bias or param, is (G, N)."""
    if vector.dim() == 1:
        return terms.sum((0, 1))
    return terms.unflatten(1, (vector.shape[0], -1)).sum((0, 2))


class Sums:
    """The weights of a layer in the order of the cell's S pre-activations (..., S H). None counts as zeros."""

    def __init__(self, cell: Cell, weights: Sequence[Any], H: int) -> None:
        weight_ih, weight_hh, bias_ih, bias_hh, *_ = weights
        self.layout, self.H = cell.layout, H
        self._names = [f"{gate}_pre" for gate in self.layout.preacts]
        blocks_ih, blocks_hh = self.layout.blocks_ih, self.layout.blocks_hh
        self.weight_ih, self.weight_hh = in_order(weight_ih, blocks_ih, -2), in_order(weight_hh, blocks_hh, -2)
        self.bias = _added(self.layout, H, in_order(bias_ih, blocks_ih, -1), in_order(bias_hh, blocks_hh, -1))

    def x_part(self, a: Tensor) -> Tensor:
        """Return the part of (..., S H) for which x is multiplied."""
        size = len(self.layout.x_preacts) * self.H
        return a if a.shape[-1] == size else a[..., :size]

    def h_part(self, a: Tensor) -> Tensor:
        """Return the part of (..., S H) for which h is multiplied."""
        start = self.layout.h_preacts.start * self.H
        return a[..., start:] if start else a

    def split(self, preact: Tensor) -> dict[str, Tensor]:
        """Return (..., H) for each gate, by its name in derived functions."""
        return dict(zip(self._names, preact.split(self.H, -1)))

    def product_ih(self, x: Tensor) -> Optional:
        """Return the product of x, as `x_part` has it."""
        return None if self.weight_ih is None else product(x, self.weight_ih)

    def product_hh(self, h: Tensor) -> Optional:
        """Return the product of h, as `h_part` has it."""
        return None if self.weight_hh is None else product(h, self.weight_hh)

    def start(self, x: Tensor) -> Tensor:
        """Return the pre-activations (T, B, S H) without the product of h, for x (T, B, I)."""
        total = _added(self.layout, self.H, self.product_ih(x), None)
        if total is None:
            total = x.new_zeros(()).expand(*x.shape[:-1], len(self.layout.preacts) * self.H)
        return add_bias(total, self.bias)

    def add_h(self, preact: Tensor, h: Tensor) -> Tensor:
        of_h, start = self.product_hh(h), self.layout.h_preacts.start * self.H
        if of_h is None:
            return preact
        if start == 0:
            return preact + of_h
        return torch.cat([preact[..., :start], preact[..., start:] + of_h], -1)

    def x_gradient(self, dpreact: Tensor) -> Optional:
        return None if self.weight_ih is None else product(self.x_part(dpreact), self.weight_ih.mT)

    def h_gradient(self, dpreact: Tensor, heads: int) -> Optional:
        weight = self.weight_hh
        if weight is None or heads == 1:
            return None if weight is None else product(self.h_part(dpreact), weight.mT)
        return (
            of_heads("...gbyko,gykoi->...gbki", None, self.h_part(dpreact), weight, self.H).flatten(-2).flatten(-3, -2)
        )

    def weight_gradients(
        self, dpreact: Tensor, x: Tensor, h: Tensor, wanted: Sequence[Any], biases: Sequence[Any]
    ) -> list[Optional]:
        """Return the wanted gradients of weights and biases, in the order of the gates, each a tensor of its own."""
        x_part, h_part = self.x_part(dpreact), self.h_part(dpreact)
        results: list[Optional] = []  # Dynamo does not know list[...]()
        for part, inputs, weight, order, want in (
            (x_part, x, self.weight_ih, self.layout.rows_ih, wanted[0]),
            (h_part, h, self.weight_hh, self.layout.rows_hh, wanted[1]),
        ):
            gradient = weight_gradient(part, inputs, weight) if want and weight is not None else None
            results.append(in_order(gradient, order, -2))
        wants = [want and bias is not None for want, bias in zip(wanted[2:], biases)]
        if not any(wants):
            return [*results, None, None]
        bias = next(bias for bias in biases if bias is not None)
        return [*results, *self.bias_gradients(vector_gradient(dpreact, bias), *wants)]

    def bias_gradients(self, dbias: Tensor, wants_ih: bool, wants_hh: bool) -> tuple[Optional, Optional]:
        """Return the wanted gradients of bias_ih and bias_hh, from `dbias` (S H,) or (G, S H)."""
        if self.layout.joint:
            return dbias if wants_ih else None, None if not wants_hh else dbias.clone() if wants_ih else dbias
        results: list[Optional] = []
        for part, order, want in (
            (self.x_part(dbias), self.layout.rows_ih, wants_ih),
            (self.h_part(dbias), self.layout.rows_hh, wants_hh),
        ):
            gradient = in_order(part, order, -1) if want else None
            results.append(part.clone() if gradient is part and part is not dbias else gradient)
        return results[0], results[1]


def in_order(a: Optional, order: Sequence[int], axis: int) -> Optional:
    """Return `a` with the blocks of an axis in another order."""
    if a is None or tuple(order) == tuple(range(len(order))):
        return a
    parts = a.chunk(len(order), axis)
    return torch.cat([parts[k] for k in order], axis)


def biases(cell: Cell, bias_ih: Optional, bias_hh: Optional) -> tuple[Optional, Optional]:
    """Return two biases, each (gates H,) or None, which together add both biases to every pre-activation once.

    The first goes to the product of x, in the order of weight_ih's blocks. It is bias_ih, plus bias_hh for the gates
    that have both products. The second goes to the product of h, in the order of the pre-activations. It is bias_hh,
    or None if the first one has all of it.
    """
    layout = cell.layout
    if layout.joint:
        return bias_hh if bias_ih is None else bias_ih if bias_hh is None else bias_ih + bias_hh, None
    rest = in_order(bias_hh, layout.blocks_hh, -1)
    if bias_hh is None or rest is None or not layout.shared_preacts:
        return bias_ih, rest
    alone = len(layout.preacts) > len(layout.x_preacts)
    parts = rest.chunk(len(layout.h_preacts), -1)
    zeros = torch.zeros_like(parts[0])
    of_sums = [parts[k - layout.h_preacts.start] if k in layout.h_preacts else zeros for k in layout.x_preacts]
    added = torch.cat([of_sums[layout.blocks_ih.index(k)] for k in range(len(of_sums))], -1)
    return added if bias_ih is None else bias_ih + added, rest if alone else None


def _added(layout: Layout, H: int, x_part: Optional, h_part: Optional) -> Optional:
    """Return (..., S H) from the parts of x and of h, which overlap. Either may be None."""
    if x_part is None and h_part is None:
        return None
    before, after = layout.h_preacts.start * H, (len(layout.preacts) - len(layout.x_preacts)) * H
    if x_part is not None and after:
        x_part = torch.nn.functional.pad(x_part, (0, after))
    if h_part is not None and before:
        h_part = torch.nn.functional.pad(h_part, (before, 0))
    return h_part if x_part is None else x_part if h_part is None else x_part + h_part
