"""The products of a layer, and how they add up to a cell's pre-activations.

All functions are differentiable and take weights of one layer, (N, K), or of a stack of G of them, (G, N, K), whose
batch rows lie in G equal groups.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import sum_of
from fastlstm.cells.layout import Layout
from fastlstm.cells.spec import Cell

Optional = Tensor | None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.mT`` for the rows of (..., B, K), by groups of rows where `weight` is a stack (G, N, K)."""
    if weight.dim() == 2:
        return x @ weight.mT
    return (x.unflatten(-2, (weight.shape[0], -1)) @ weight.mT).flatten(-3, -2)


def of_heads(equation: str, h: Optional, sums: Optional, weight: Tensor, H: int) -> Tensor:
    """An einsum of two of these three: h (..., B, H) as (..., g, b, k, i), sums (..., B, Y H) as (..., g, b, y, k, o),
    and the weights (Y H, D) or (G, Y H, D) of heads of D units as (g, y, k, o, i).
    """
    D, G = weight.shape[-1], weight.shape[0] if weight.dim() == 3 else 1
    parts = [] if h is None else [h.reshape(*h.shape[:-2], G, -1, H // D, D)]
    parts += [] if sums is None else [sums.reshape(*sums.shape[:-2], G, -1, sums.shape[-1] // H, H // D, D)]
    parts += [weight.reshape(G, -1, H // D, D, D)][: 2 - len(parts)]
    return torch.einsum(equation, *parts)


def dense(weight: Tensor, H: int) -> Tensor:
    """(..., Y H, H) of the weights (..., Y H, H / K) of heads, zero where a unit does not see another."""
    heads = torch.arange(H, device=weight.device) // weight.shape[-1]
    blocks = weight.unflatten(-2, (-1, H))
    blocks = torch.cat([blocks] * (H // weight.shape[-1]), -1)
    return blocks.masked_fill(heads.unsqueeze(-1) != heads, 0).flatten(-3, -2)


def add_bias(sums: Tensor, bias: Optional) -> Tensor:
    """Add (N,) to every row, or row g of (G, N) to the rows of group g."""
    if bias is None:
        return sums
    if bias.dim() == 1:
        return sums + bias
    return (sums.unflatten(-2, (bias.shape[0], -1)) + bias.unsqueeze(-2)).flatten(-3, -2)


def for_rows(vector: Tensor, rows: int) -> Tensor:
    """(B, H) of a vector (H,), or of (G, H) for G groups of rows."""
    if vector.dim() == 1:
        return vector.expand(rows, -1)
    groups, H = vector.shape
    return vector.unsqueeze(1).expand(groups, rows // groups, H).flatten(0, 1)


def rows_of(a: Tensor, groups: int) -> Tensor:
    """(T B, N) of (T, B, N), or (G, T B / G, N) for G groups of rows. 0 is one layer that is no stack."""
    if groups:
        return a.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)
    T, B, N = a.shape
    return a.reshape(T * B, N)


def weight_gradient(dsums: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """The sum of the outer products of ``dsums`` and ``inputs`` over all rows, by groups if `weight` is a stack, and by
    heads if it has fewer columns than ``inputs``.
    """
    if weight.shape[-1] < inputs.shape[-1]:
        return of_heads("...gbki,...gbyko->gykoi", inputs, dsums, weight, inputs.shape[-1]).reshape(weight.shape)
    groups = weight.shape[0] if weight.dim() == 3 else 0
    return rows_of(dsums, groups).mT @ rows_of(inputs, groups)


def vector_gradient(terms: Tensor, vector: Tensor) -> Tensor:
    """The sum of (T, B, N) over steps and rows, by groups of rows where `vector`, a bias or param, is (G, N)."""
    if vector.dim() == 1:
        return terms.sum((0, 1))
    return terms.unflatten(1, (vector.shape[0], -1)).sum((0, 2))


class Sums:
    """The weights of a layer in the order of its cell's sums, or tangents of them; None counts as zeros.

    Pre-activations are (..., S H) for S sums, in the order of `Layout.preacts`.
    """

    def __init__(self, cell: Cell, weights: Sequence[Any], H: int) -> None:
        weight_ih, weight_hh, bias_ih, bias_hh, *_ = weights
        self.layout, self.H = cell.layout, H
        self._names = [f"{gate}_pre" for gate in self.layout.preacts]
        of_x, of_h = self.layout.blocks_ih, self.layout.blocks_hh
        self.weight_ih, self.weight_hh = in_order(weight_ih, of_x, -2), in_order(weight_hh, of_h, -2)
        self.bias = _added(self.layout, H, in_order(bias_ih, of_x, -1), in_order(bias_hh, of_h, -1))

    def of_x(self, a: Tensor) -> Tensor:
        """Of (..., S H) what belongs to the sums of x."""
        size = len(self.layout.x_preacts) * self.H
        return a if a.shape[-1] == size else a[..., :size]

    def of_h(self, a: Tensor) -> Tensor:
        """Of (..., S H) what belongs to the sums of h."""
        start = self.layout.h_preacts.start * self.H
        return a[..., start:] if start else a

    def split(self, sums: Tensor) -> dict[str, Tensor]:
        """(..., H) for each gate, by what it is called in derived functions."""
        return dict(zip(self._names, sums.split(self.H, -1)))

    def product_ih(self, x: Tensor) -> Optional:
        """The product of x, as of_x has it."""
        return None if self.weight_ih is None else linear(x, self.weight_ih)

    def product_hh(self, h: Tensor) -> Optional:
        """The product of h, as of_h has it."""
        weight = self.weight_hh
        if weight is None or weight.shape[-1] == h.shape[-1]:
            return None if weight is None else linear(h, weight)
        return of_heads("...gbki,gykoi->...gbyko", h, None, weight, self.H).flatten(-3).flatten(-3, -2)

    def multiply(self, x: Tensor) -> Tensor:
        """The product of x (..., I) as part of the pre-activations (..., S H)."""
        total = _added(self.layout, self.H, self.product_ih(x), None)
        return x.new_zeros(()).expand(*x.shape[:-1], len(self.layout.preacts) * self.H) if total is None else total

    def start(self, x: Tensor) -> Tensor:
        """The pre-activations (T, B, S H) before h is multiplied."""
        return add_bias(self.multiply(x), self.bias)

    def add_h(self, sums: Tensor, h: Optional) -> Tensor:
        """`sums` with the product of h."""
        product, start = None if h is None else self.product_hh(h), self.layout.h_preacts.start * self.H
        if product is None:
            return sums
        if start == 0:
            return sums + product
        return torch.cat([sums[..., :start], sums[..., start:] + product], -1)

    def to_x(self, dsums: Tensor) -> Optional:
        """The gradient of x."""
        return None if self.weight_ih is None else linear(self.of_x(dsums), self.weight_ih.mT)

    def to_h(self, dsums: Tensor) -> Optional:
        """The gradient of h, by way of its product."""
        weight = self.weight_hh
        if weight is None or weight.shape[-1] == self.H:
            return None if weight is None else linear(self.of_h(dsums), weight.mT)
        return of_heads("...gbyko,gykoi->...gbki", None, self.of_h(dsums), weight, self.H).flatten(-2).flatten(-3, -2)

    def weights(
        self, dsums: Tensor, x: Optional, h: Optional, wanted: Sequence[Any], biases: Sequence[Any]
    ) -> list[Optional]:
        """The gradients of weight_ih, weight_hh, bias_ih and bias_hh in the order of the cell's gates, so far as they
        are wanted. Each is a tensor of its own, since what is done to one in place is not to be done to another.
        """
        of_x, of_h = self.of_x(dsums), self.of_h(dsums)
        results: list[Optional] = []  # Dynamo does not know list[...]()
        for part, inputs, weight, order, want in (
            (of_x, x, self.weight_ih, self.layout.rows_ih, wanted[0]),
            (of_h, h, self.weight_hh, self.layout.rows_hh, wanted[1]),
        ):
            gradient = None
            if want and weight is not None and inputs is not None:
                gradient = in_order(weight_gradient(part, inputs, weight), order, -2)
            results.append(gradient)
        wants = [want and bias is not None for want, bias in zip(wanted[2:], biases)]
        if not any(wants):
            return [*results, None, None]
        bias = next(bias for bias in biases if bias is not None)
        return [*results, *self.bias_gradients(vector_gradient(dsums, bias), *wants)]

    def bias_gradients(self, dbias: Tensor, of_ih: bool, of_hh: bool) -> tuple[Optional, Optional]:
        """The gradients of bias_ih and bias_hh, so far as they are wanted, from `dbias` (S H,) or (G, S H)."""
        if self.layout.joint:
            return dbias if of_ih else None, None if not of_hh else dbias.clone() if of_ih else dbias
        results: list[Optional] = []
        for part, order, want in (
            (self.of_x(dbias), self.layout.rows_ih, of_ih),
            (self.of_h(dbias), self.layout.rows_hh, of_hh),
        ):
            gradient = in_order(part, order, -1) if want else None
            results.append(part.clone() if gradient is part and part is not dbias else gradient)
        return results[0], results[1]


def in_order(a: Optional, order: Sequence[int], axis: int) -> Optional:
    """The blocks of an axis in another order."""
    if a is None or tuple(order) == tuple(range(len(order))):
        return a
    parts = a.chunk(len(order), axis)
    return torch.cat([parts[k] for k in order], axis)


def biases(cell: Cell, bias_ih: Optional, bias_hh: Optional) -> tuple[Optional, Optional]:
    """What to add to the product of x, in the order of weight_ih's blocks: bias_ih and those blocks of bias_hh that go
    to sums of both products. And bias_hh in the order of the sums of h, or None if nothing else of it is needed.
    """
    layout = cell.layout
    if layout.joint:
        return sum_of(bias_ih, bias_hh), None
    rest = in_order(bias_hh, layout.blocks_hh, -1)
    if bias_hh is None or rest is None or not layout.shared_preacts:
        return bias_ih, rest
    alone = len(layout.preacts) > len(layout.x_preacts)
    parts = rest.chunk(len(layout.h_preacts), -1)
    zeros = torch.zeros_like(parts[0])
    of_sums = [parts[k - layout.h_preacts.start] if k in layout.h_preacts else zeros for k in layout.x_preacts]
    added = torch.cat([of_sums[layout.blocks_ih.index(k)] for k in range(len(of_sums))], -1)
    return added if bias_ih is None else bias_ih + added, rest if alone else None


def _added(layout: Layout, H: int, of_x: Optional, of_h: Optional) -> Optional:
    """(..., S H) of what belongs to the sums of x and to those of h, which overlap; either may be missing."""
    if of_x is None and of_h is None:
        return None
    before, after = layout.h_preacts.start * H, (len(layout.preacts) - len(layout.x_preacts)) * H
    if of_x is not None and after:
        of_x = torch.nn.functional.pad(of_x, (0, after))
    if of_h is not None and before:
        of_h = torch.nn.functional.pad(of_h, (before, 0))
    return of_h if of_x is None else of_x if of_h is None else of_x + of_h
