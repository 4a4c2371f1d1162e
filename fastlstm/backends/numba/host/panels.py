"""Counts of vectors and panels: a panel is the hidden units that fill one vector."""

from functools import cache
from itertools import pairwise

import torch

from fastlstm.cells.spec import Cell


@cache
def lanes_of(dtype: torch.dtype) -> int:
    """Return how many numbers of this type a vector has."""
    from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES

    return VECTOR_BYTES // dtype.itemsize


def panels_of(size: int, lanes: int) -> int:
    """Return how many vectors hold `size` numbers."""
    return (size + lanes - 1) // lanes


def saved_panels(cell: Cell, H: int, lanes: int) -> int:
    """Return how many panels the saved values have: one more for the values that a row's units share."""
    return panels_of(H, lanes) + (len(cell.layout.saved_rows) > 0)


def span_of(H: int, heads: int, lanes: int, columns: int) -> int:
    """Return the most `columns` of h, or of a value, that a panel multiplies: those of its units' heads."""
    if heads == 1:
        return columns
    D = H // heads
    return max((min(unit + lanes, H) - 1) // D - unit // D + 1 for unit in range(0, H, lanes)) * D


def reach_of(H: int, heads: int, lanes: int) -> int:
    """Return the most panels whose dpreact a vector group of columns of h multiplies: those of its columns' heads."""
    D, panels = H // heads, panels_of(H, lanes)
    groups = panels_of(panels, 4)
    ends = [panels_of(panels * q, groups) * lanes for q in range(groups)] + [H]
    return max(panels_of(((end - 1) // D + 1) * D, lanes) - begin // D * D // lanes for begin, end in pairwise(ends))
