"""The memory of tensors on a CPU: addresses, contiguous rows, and copies that nobody else writes to."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor


def address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def rows_contiguous(a: Tensor) -> Tensor:
    """Return `a` with contiguous rows. If one number stands for all rows, as in the gradient of a sum, one row does."""
    strides = a.stride()
    if strides[-1] == 1 or a.shape[-1] == 1:
        return a
    if strides[-1] != 0 or a.numel() < 1 << 16:  # copying so few is faster than the calls below
        return a.contiguous()
    sizes = [1 if stride == 0 else size for size, stride in zip(a.shape, strides)]
    return a.as_strided(sizes, strides).expand(*sizes[:-1], a.shape[-1]).contiguous().expand(a.shape)


def snapshot_of(weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return copies of weights that nobody writes to: packed form and digest agree whatever other threads write
    meanwhile. One thread copies, since torch's copies hang in a forked child.
    """
    return [None if a is None else _copy_of(a.detach().contiguous()) for a in weights]


def _copy_of(a: Tensor) -> Tensor:
    copy = torch.empty_like(a)
    ctypes.memmove(copy.data_ptr(), a.data_ptr(), a.nbytes)
    return copy
