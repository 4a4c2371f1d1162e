"""What calls that run the same way have in common."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch

from fastlstm.backends.cpu import rows_contiguous, threads_now
from fastlstm.backends.memory import converted

Weights = tuple[Any, ...]  # weight_ih, weight_hh, and bias_ih and bias_hh or None


class Signature(NamedTuple):
    """What calls that run the same way have in common.

    Attributes:
        T, B, I, H: as everywhere; B of one group where the layer is a stack.
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
    """

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

    @property
    def rows(self) -> int:
        """Batch rows of all groups."""
        return self.B * (self.groups or 1)

    @property
    def row_strides(self) -> dict[str, int]:
        """Bytes from one step and row of x to the next, and from one row of each weight."""
        x, ih, hh = self.strides
        size, step = 2 if self.narrow else self.dtype.itemsize, x[0] if len(x) > 2 else 0
        elements = {"x_step": step, "x_row": x[-2], "weight_ih_row": ih[-2], "weight_hh_row": hh[-2]}
        return {name: count * size for name, count in elements.items()}

    @property
    def group_strides(self) -> dict[str, int]:
        """The same from one group of a stack to the next."""
        x, ih, hh = self.strides
        size = 2 if self.narrow else self.dtype.itemsize
        of_x = x[1] if len(x) == 4 else self.B * x[-2]  # with an axis of their own all groups may read the same x
        of_masks = {"lengths": 8 * self.B, "reset": self.B}
        return {"x": of_x * size, "weight_ih": ih[0] * size, "weight_hh": hh[0] * size, **of_masks}

    def cast(self, weights: Weights) -> Weights:
        """Weights as the kernel takes them: rounded, then in the type that it computes in, or as they are."""
        if self.given is self.rounded is self.dtype:
            return weights
        rounded = (a if a is None else a.to(self.rounded) for a in weights)
        return (
            *(a if a is None or (self.narrow and n < 2) else converted(a, self.dtype) for n, a in enumerate(rounded)),
        )


def signature_of(layer: Any, ends: tuple[int, ...], pieces: int) -> Signature:
    """The signature of a layer whose x and weights have their rows contiguous."""
    x, (weight_ih, weight_hh, *_) = layer.x, layer.weights
    step = x.dim() == 2
    T, *rows, I = (1, *x.shape) if step else x.shape
    groups = weight_ih.shape[0] if weight_ih.dim() == 3 else None
    narrow = x.dtype is torch.bfloat16
    return Signature(
        T, prod(rows) // (groups or 1), I, weight_hh.shape[-1], groups, torch.float32 if narrow else x.dtype, narrow,
        weight_ih.dtype, x.dtype, (x.stride(), weight_ih.stride(), weight_hh.stride()), layer.reverse,
        layer.reset is not None, layer.lengths is not None, step, ends, pieces, True, threads_now(),
    )  # fmt: skip


def readable(layer: Any) -> Any:
    """A layer as the kernels read it: each row of x and of the weights contiguous, and the biases."""
    weight_ih, weight_hh, *biases = layer.weights
    weights = rows_contiguous(weight_ih), rows_contiguous(weight_hh), *map(contiguous, biases)
    return layer._replace(x=rows_contiguous(layer.x), weights=weights)


def contiguous(a: Any) -> Any:
    """A tensor, or None, contiguous."""
    return a if a is None else a.contiguous()
