"""Addresses and strides of tensors in bytes, as the fields of the argument structs hold them."""

from torch import Tensor


def address_and_row_stride(a: Tensor) -> tuple[int, int]:
    """Return the address and the row stride of (..., rows, columns)."""
    return a.data_ptr(), a.stride(-2) * a.element_size()


def address_and_strides(a: Tensor) -> tuple[int, int, int]:
    """Return the address, the step stride and the row stride of (steps, ..., rows, columns)."""
    size, (step, *_, row, _) = a.element_size(), a.stride()
    return a.data_ptr(), step * size, row * size


def stack_row_strides(B: int, **tensors: Tensor | None) -> dict[str, int]:
    """Return the strides from one stacked layer's B rows to the next one's."""
    return {k: B * a.stride(-2) * a.element_size() for k, a in tensors.items() if a is not None}


def stack_strides(**tensors: Tensor | None) -> dict[str, int]:
    """Return the strides of the first axis, which is that of the stacked layers."""
    return {k: a.stride(0) * a.element_size() for k, a in tensors.items() if a is not None}
