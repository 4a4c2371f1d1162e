"""The signature of a call: everything that decides how it runs, the counts of its cell among it."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch

from fastlstm.backends.base import heads_of, hidden_size, output_size, stack_size_of
from fastlstm.backends.cpu import threads_now
from fastlstm.backends.memory import rows_contiguous
from fastlstm.backends.pool import converted
from fastlstm.cells.spec import Cell

Weights = tuple[Any, ...]  # weight_ih, weight_hh, and bias_ih and bias_hh or None; then params
Source = tuple[str, int]  # of a field of a kernel's arguments: the name of a value, and what is added to it
ZERO = "zero"  # the name of a value that is 0


class Counts(NamedTuple):
    """Counts the values of a cell, and says what its kernels must be able to do.

    Attributes:
        preacts, x_preacts, h_preacts: all pre-activations, those with a product of x, and those with one of h.
        joint: whether every pre-activation has both products.
        carries_h: whether the gradient of h goes to the step before also beside its product.
        reads_new: whether the backward pass reads states after the step.
        means: whether the cell takes means over units.
        has_phases: whether the cell takes means over units or has products, and so runs in phases.
        products, product_groups, group_size: products of values of the step, their groups, and the most of a group.
    """

    preacts: int
    x_preacts: int
    h_preacts: int
    params: int
    inputs: int
    inner_states: int
    joint: bool
    carries_h: bool
    reads_new: bool
    means: bool
    has_phases: bool
    products: int
    product_groups: int
    group_size: int

    @property
    def operands(self) -> int:
        return self.inputs + self.params


@cache
def counts(cell: Cell) -> Counts:
    layout, read = cell.layout, set(cell.derived().states_read)
    first, *inner = layout.states
    numbers = len(layout.preacts), len(layout.x_preacts), len(layout.h_preacts)
    means = bool(cell.derived().means)
    has_phases = means or bool(cell.products)
    return Counts(
        *numbers, len(layout.params), len(layout.inputs), len(inner), layout.joint,
        first in layout.carried, bool(read & set(layout.states)), means, has_phases,
        len(layout.products), len(layout.product_groups), max(map(len, layout.product_groups), default=0),
    )  # fmt: skip


class Signature(NamedTuple):
    """Everything that decides how a call runs: two calls of one signature run the same kernels, with equal buffers.

    Attributes:
        cell: what a step computes.
        T, B, I, H: steps, batch rows of one stacked layer, inputs (0 if the cell multiplies no x), units.
        stack_size: the number of layers in a stack, or None.
        dtype: what x is computed in.
        is_bfloat16: whether x and h are bfloat16, which the kernel takes as it is.
        weight_dtype, rounded_dtype: the dtype of the weights, and the one that they are rounded to before use.
        strides: of x, weight_ih, weight_hh and each input, in elements.
        reverse, has_resets, has_lengths: the layer's direction; whether it has `reset`, and `lengths`.
        is_single_step: whether x is (B, I), and there is no output but the last state.
        state_axes: the sizes of the states' axes before (rows, H), such as (1,).
        components: of a number in the products on the bf16 unit, 0 without it.
        threads: the number that a call may use.
        biased: whether there is bias_ih, and bias_hh.
        heads, h_width: see `Layer`; the units of the first state: H, or fewer in a projected layer.
    """

    cell: Cell
    T: int
    B: int
    I: int
    H: int
    stack_size: int | None
    dtype: torch.dtype
    is_bfloat16: bool
    weight_dtype: torch.dtype
    rounded_dtype: torch.dtype
    strides: tuple[tuple[int, ...], ...]
    reverse: bool
    has_resets: bool
    has_lengths: bool
    is_single_step: bool
    state_axes: tuple[int, ...]
    components: int
    threads: int
    biased: tuple[bool, bool]
    heads: int
    h_width: int

    @property
    def counts(self) -> Counts:
        return counts(self.cell)

    @property
    def splits_rows(self) -> bool:
        """Whether the members of a team split the rows for the cell, because of means over units or of a projection."""
        return self.counts.means or self.h_width != self.H

    @property
    def multiply_adds_per_unit(self) -> int:
        """The multiply-adds of a step for each unit of a row."""
        counts = self.counts
        return counts.x_preacts * self.I + (counts.h_preacts + counts.products) * self.h_width // self.heads

    @property
    def rows(self) -> int:
        """The batch rows of all stacked layers."""
        return self.B * (self.stack_size or 1)

    @property
    def kernel_element_bytes(self) -> int:
        """The bytes of an element of x and of the weights, as the kernel reads them."""
        return 2 if self.is_bfloat16 else self.dtype.itemsize

    @property
    def input_strides(self) -> dict[str, int]:
        """The fields of the strides of x and of both weights."""
        x, ih, hh, *_ = self.strides
        step = x[0] if len(x) > 2 else 0
        elements = {"x_step_stride": step, "x_row_stride": x[-2]}
        elements |= {"ih_row_stride": row_stride_of(ih), "hh_row_stride": row_stride_of(hh)}
        return {name: count * self.kernel_element_bytes for name, count in elements.items()}

    @property
    def input_stack_strides(self) -> dict[str, int]:
        """The strides of x, of both weights and of the masks from one stacked layer to the next."""
        x, ih, hh, *_ = self.strides
        x_stride = x[1] if len(x) == 4 else self.B * x[-2]  # with an axis of their own all layers may read the same x
        weights = {name: a[0] * self.kernel_element_bytes for name, a in (("weight_ih", ih), ("weight_hh", hh)) if a}
        return {"x": x_stride * self.kernel_element_bytes, **weights, "lengths": 8 * self.B, "reset": self.B}

    def cast(self, weights: Weights, narrow: tuple[int, ...] = (0, 1, 4)) -> Weights:
        """Return the weights as the kernel takes them: rounded, then in the type that it computes in, or unchanged.
        `narrow`: the indices of those that stay bfloat16 in a layer of it: matrices.
        """
        if self.weight_dtype is self.rounded_dtype is self.dtype:
            return weights
        rounded = [a if a is None else a.to(self.rounded_dtype) for a in weights]
        kept = narrow if self.is_bfloat16 else ()
        return (*(a if a is None or k in kept else converted(a, self.dtype) for k, a in enumerate(rounded)),)


def row_stride_of(strides: tuple[int, ...]) -> int:
    """Return the row stride of a weight of these strides, in elements, or 0 if the layer has no such weight."""
    return strides[-2] if strides else 0


def strides(layer: Any) -> tuple[tuple[int, ...], ...]:
    """Return the strides that a kernel gets once, when it is prepared: of x, both weights and inputs, () for None."""
    ih, hh, *_ = layer.weights
    weights = () if ih is None else ih.stride(), () if hh is None else hh.stride()
    return layer.x.stride(), *weights, *[a.stride() for a in layer.inputs]


def signature_of(layer: Any, state_axes: tuple[int, ...], components: int) -> Signature:
    """Return the signature of a layer whose x and weights have their rows contiguous."""
    x, cell = layer.x, layer.cell
    is_single_step, is_bfloat16 = x.dim() == 2, x.dtype is torch.bfloat16
    T, *rows, I = (1, *x.shape) if is_single_step else x.shape
    stack_size = stack_size_of(layer) or None
    weight_dtype = next((a.dtype for a in layer.weights if a is not None), x.dtype)
    return Signature(
        cell, T, prod(rows) // (stack_size or 1), I if counts(cell).x_preacts else 0, hidden_size(layer), stack_size,
        torch.float32 if is_bfloat16 else x.dtype, is_bfloat16, weight_dtype, x.dtype, strides(layer),
        layer.reverse, layer.reset is not None, layer.lengths is not None, is_single_step, state_axes, components,
        threads_now(), (layer.weights[2] is not None, layer.weights[3] is not None), heads_of(layer),
        output_size(layer),
    )  # fmt: skip


def readable(layer: Any) -> Any:
    """Return a layer as the kernels read it: each row of x, inputs and weights contiguous, and all other tensors."""
    weights = *map(with_rows, layer.weights[:2]), *map(contiguous, layer.weights[2:])
    states, inputs = (*map(contiguous, layer.states),), (*map(rows_contiguous, layer.inputs),)
    x, lengths, reset = rows_contiguous(layer.x), contiguous(layer.lengths), contiguous(layer.reset)
    return layer._replace(x=x, weights=weights, states=states, lengths=lengths, reset=reset, inputs=inputs)


def with_rows(a: Any) -> Any:
    """Return a tensor with contiguous rows, or None as it is."""
    return a if a is None else rows_contiguous(a)


def contiguous(a: Any) -> Any:
    """Return a tensor contiguous, or None as it is."""
    return a if a is None else a.contiguous()
