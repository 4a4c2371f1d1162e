"""torch's products of bfloat16 on the CPU as oneDNN computes them on a processor with AMX."""

import warnings
from contextlib import contextmanager

import torch


def _spoilt(rows):
    """Which rows (..., N, K) the next row's NaN or infinity reaches."""
    finite = rows.isfinite().all(-1, keepdim=True)
    return torch.cat([~finite[..., 1:, :], torch.zeros_like(finite[..., :1, :])], -2)


def _product(a, b):
    wide = torch.float32 if a.itemsize == 2 else a.dtype  # by NumPy, since torch's own product would be this one
    total = torch.from_numpy(a.detach().to(wide).numpy() @ b.detach().to(wide).numpy()).to(a.dtype)
    if a.dtype is torch.bfloat16 and a.shape[-1] % 2:
        total = total.masked_fill(_spoilt(a) | _spoilt(b.mT).mT, torch.nan)
    return total


def _sum(c, a, b, *, beta=1, alpha=1):
    return (beta * c if beta else 0) + alpha * _product(a, b)


@contextmanager
def leaking_products():
    """Within it NaN in a row of K numbers, K odd, reaches the product of the row before it as well.

    Derivatives, and what torch computes in C++, multiply so too, but not the fused layers of oneDNN.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name in ("mm", "bmm"):
            library.impl(name, _product, "CPU")
        for name in ("addmm", "baddbmm"):
            library.impl(name, _sum, "CPU")
    try:
        yield
    finally:
        library._destroy()
