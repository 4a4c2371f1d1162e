"""What calls that run the same way have in common."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch

from fastlstm.backends.base import groups_of, heads_of, hidden_size
from fastlstm.backends.cpu import rows_contiguous, threads_now
from fastlstm.backends.memory import converted
from fastlstm.backends.numba.host.cells import Counts, counts
from fastlstm.cells.spec import Cell

Weights = tuple[Any, ...]  # weight_ih, weight_hh, and bias_ih and bias_hh or None; then params


class Signature(NamedTuple):
    """What calls that run the same way have in common.

    Attributes:
        cell: what a step computes.
        T, B, I, H: as everywhere; B of one group where the layer is a stack, and no I of an x that is not multiplied.
        groups: the number of layers in a stack, or None.
        dtype: what x is computed in.
        narrow: x and h are of bfloat16, which the kernel takes as it is.
        given, rounded: the dtypes that weights have, and that they are rounded to before anything is computed.
        strides: of x, weight_ih and weight_hh, in elements.
        reverse, resets, ends_early: the layer's direction; whether it has `reset`, and `lengths`.
        step: x is (B, I), and there is no output but the last state.
        ends: the leading axes of the states.
        pieces, unit: of a number in all products, see `PIECES`; whether any product may take the matrix unit.
        threads: those that a call may use.
        biased: whether there is bias_ih, and bias_hh.
        heads: see `Layer`.
    """

    cell: Cell
    T: int
    B: int
    I: int
    H: int
    groups: int | None
    dtype: torch.dtype
    narrow: bool
    given: torch.dtype
    rounded: torch.dtype
    strides: tuple[tuple[int, ...], ...]
    reverse: bool
    resets: bool
    ends_early: bool
    step: bool
    ends: tuple[int, ...]
    pieces: int
    unit: bool
    threads: int
    biased: tuple[bool, bool]
    heads: int

    @property
    def counts(self) -> Counts:
        """What the cell has."""
        return counts(self.cell)

    @property
    def across(self) -> bool:
        """Whether units see each other by means, or not all of h: the kernels for that know nothing of matrix units."""
        return self.counts.means or self.heads > 1

    @property
    def products(self) -> int:
        """Multiply-adds for each unit of a row."""
        return self.counts.of_x * self.I + self.counts.of_h * self.H // self.heads

    @property
    def rows(self) -> int:
        """Batch rows of all groups."""
        return self.B * (self.groups or 1)

    @property
    def row_strides(self) -> dict[str, int]:
        """Bytes from one step and row of x to the next, and from one row of each weight."""
        x, ih, hh = self.strides
        size, step = 2 if self.narrow else self.dtype.itemsize, x[0] if len(x) > 2 else 0
        elements = {"x_step": step, "x_row": x[-2], "weight_ih_row": row_of(ih), "weight_hh_row": row_of(hh)}
        return {name: count * size for name, count in elements.items()}

    @property
    def group_strides(self) -> dict[str, int]:
        """The same from one group of a stack to the next."""
        x, ih, hh = self.strides
        size = 2 if self.narrow else self.dtype.itemsize
        of_x = x[1] if len(x) == 4 else self.B * x[-2]  # with an axis of their own all groups may read the same x
        of_masks = {"lengths": 8 * self.B, "reset": self.B}
        of_weights = {name: a[0] * size for name, a in (("weight_ih", ih), ("weight_hh", hh)) if a}
        return {"x": of_x * size, **of_weights, **of_masks}

    def cast(self, weights: Weights) -> Weights:
        """Weights as the kernel takes them: rounded, then in the type that it computes in, or as they are."""
        if self.given is self.rounded is self.dtype:
            return weights
        rounded = (a if a is None else a.to(self.rounded) for a in weights)
        return (
            *(a if a is None or (self.narrow and n < 2) else converted(a, self.dtype) for n, a in enumerate(rounded)),
        )


def row_of(strides: tuple[int, ...]) -> int:
    """That of the rows of a weight, if there is one."""
    return strides[-2] if strides else 0


def strides_of(a: Any) -> tuple[int, ...]:
    """Those of a tensor, or of none."""
    return () if a is None else a.stride()


def signature_of(layer: Any, ends: tuple[int, ...], pieces: int) -> Signature:
    """The signature of a layer whose x and weights have their rows contiguous."""
    x, (weight_ih, weight_hh, *_), cell = layer.x, layer.weights, layer.cell
    step = x.dim() == 2
    T, *rows, I = (1, *x.shape) if step else x.shape
    groups, given = groups_of(layer) or None, next((a.dtype for a in layer.weights if a is not None), x.dtype)
    narrow = x.dtype is torch.bfloat16
    strides = x.stride(), strides_of(weight_ih), strides_of(weight_hh)
    return Signature(
        cell, T, prod(rows) // (groups or 1), I if counts(cell).of_x else 0, hidden_size(layer), groups,
        torch.float32 if narrow else x.dtype, narrow, given, x.dtype, strides,
        layer.reverse, layer.reset is not None, layer.lengths is not None, step, ends, pieces,
        counts(cell).on_unit and heads_of(layer) == 1, threads_now(),
        (layer.weights[2] is not None, layer.weights[3] is not None), heads_of(layer),
    )  # fmt: skip


def readable(layer: Any) -> Any:
    """A layer as the kernels read it: each row of x, of the inputs and of the weights contiguous, and all vectors."""
    matrices, vectors = layer.weights[:2], layer.weights[2:]
    weights = *(a if a is None else rows_contiguous(a) for a in matrices), *map(contiguous, vectors)
    return layer._replace(x=rows_contiguous(layer.x), weights=weights, inputs=(*map(rows_contiguous, layer.inputs),))


def contiguous(a: Any) -> Any:
    """A tensor, or None, contiguous."""
    return a if a is None else a.contiguous()
