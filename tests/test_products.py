"""The tiles of a product cover its rows, whatever their number."""

import ctypes

import pytest
import torch

from fastlstm.backends.numba import tasks

ROWS = (*range(1, 40), 64, 65)


def largest_error(dtype, vectors, rows):
    """Of `rows` rows against float64; the row after them is to stay as it was."""
    table = tasks.primitives(dtype.itemsize, 0)
    width, K, size = table["lanes"] * vectors, 9, dtype.itemsize
    init, a, w = (
        torch.randn(rows, width, dtype=dtype),
        torch.randn(rows, K, dtype=dtype),
        torch.randn(K, width, dtype=dtype),
    )
    out = torch.full((rows + 1, width), torch.nan, dtype=dtype)
    arguments = [rows, init.data_ptr(), width * size, out.data_ptr(), width * size, w.data_ptr()]
    arguments += [a.data_ptr(), K * size, size, K, 1, 0, 0, a.data_ptr(), 0, 0]
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(table[f"product{vectors}"])(*arguments)
    assert out[rows:].isnan().all()
    return torch.nan_to_num(
        (out[:rows].double() - (init.double() + a.double() @ w.double())).abs(), nan=torch.inf
    ).max()


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_every_row_is_computed_once(dtype, bound, vectors):
    for rows in ROWS:
        assert largest_error(dtype, vectors, rows) < bound, rows  # nine terms of a few units at most


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
def test_a_lone_row_in_blocks_is_a_row_of_many(vectors):
    """The same bits, wherever blocks begin and whichever part of the first has been summed before."""
    table, size = tasks.primitives(4, 0), 4
    width = table["lanes"] * vectors
    x, h, w = torch.randn(13), torch.randn(30), torch.randn(43, width)
    init, zeros = torch.randn(1, width), torch.zeros(1, width)

    def call(name, *arguments):
        pointers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(pointers))(table[name])(*pointers)

    for block in (1, 5, 13, 20, 43, 50):
        columns, want, start = torch.cat([x, h]), torch.empty(1, width), init
        for k in range(0, 43, block):
            part = min(block, 43 - k)
            call(f"product{vectors}", 1, start, 0, want, 0, w[k:], columns[k:], 0, size, part, 1, 0, 0, columns, 0, 0)
            start = want
        whole = torch.full((1, width), torch.nan)
        call(f"lone{vectors}", init, whole, x, w, 13, h, w[13:], 30, block, block, zeros)
        assert torch.equal(whole, want), block
        done = 13 % block  # columns of x in the block in which h follows, after whole ones
        fed, part = init.clone(), zeros.clone()
        for k in range(0, 13 - done, block):
            call(f"product{vectors}", 1, fed, 0, fed, 0, w[k:], x[k:], 0, size, block, 1, 0, 0, x, 0, 0)
        if done:
            at = 13 - done
            call(f"product{vectors}", 1, zeros, 0, part, 0, w[at:], x[at:], 0, size, done, 1, 0, 0, x, 0, 0)
        call(f"lone{vectors}", fed, whole.fill_(torch.nan), x, w, 0, h, w[13:], 30, block - done, block, part)
        assert torch.equal(whole, want), block
