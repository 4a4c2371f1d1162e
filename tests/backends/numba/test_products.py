"""The tiles of a product cover its rows, whatever their number."""

import ctypes

import pytest
import torch

from fastlstm import cells
from fastlstm.backends.numba.host import tasks
from fastlstm.backends.numba.host.sizes import lanes_of
from tests.helpers.numba import ROWS, largest_error


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_every_row_is_computed_once(dtype, bound, vectors):
    for rows in ROWS:
        assert largest_error(dtype, vectors, rows) < bound, rows  # nine terms of a few units at most


def call(name, *arguments):
    """A primitive for float32."""
    pointers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    tables = map(tasks.primitives, ("primitives4", "in_place.Forward.4", "in_place.Backward.4"))
    table = {field: address for each in tables for field, address in each.items()}
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(pointers))(table[name])(*pointers)


def product(vectors, rows, init, of_init, out, of_out, w, of_w, a, of_a, columns):
    """Of rows that lie `of_` bytes apart each, in one piece."""
    call(f"gemm{vectors}", rows, init, of_init, out, of_out, w, of_w, a, of_a, 4, columns, 1, 0, 0, a, 0, 0)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
def test_weights_in_place_give_the_bits_of_packed_ones(rows):
    """From any column on, and where fewer columns follow than a vector has lanes."""
    size, L = 4, lanes_of(torch.float32)
    for I, H in ((L, L), (L + 1, 3 * L), (40, 2 * L + 5)):
        x, h, of_x, of_h = torch.randn(rows, I), torch.randn(rows, H), torch.randn(L, I), torch.randn(L, H)
        init = torch.randn(L)
        for k in (0, 3, I - L, I - 1):
            for count in (0, 1, H - 2, H):
                got, want = torch.full((rows, 2 * L), torch.nan), torch.empty(rows, L)
                call(
                    "in_place", rows, init, 0, got, 2 * L * size, x[:, k:], I * size, of_x[:, k:], I * size, I - k,
                    I - L - k, h, H * size, of_h, H * size, count, H - L,
                )  # fmt: skip
                a = torch.cat([x[:, k:], h[:, :count]], 1)
                w, columns = torch.cat([of_x[:, k:], of_h[:, :count]], 1).mT.contiguous(), a.shape[1]
                product(1, rows, init, 0, want, L * size, w, L * size, a, columns * size, columns)
                assert torch.equal(got[:, :L], want)
                assert got[:, L:].isnan().all()


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
def test_pieces_of_weights_make_one_sum(vectors):
    size, width = 4, lanes_of(torch.float32) * vectors
    for rows in ROWS:
        a, w, zeros = torch.randn(rows, 13), torch.randn(13, width + 3), torch.zeros(rows, width)
        want, found = torch.empty(rows, width), torch.full((rows + 1, width), torch.nan)
        found[:rows] = 0
        row, of_w = width * size, (width + 3) * size
        product(vectors, rows, zeros, row, want, row, w, of_w, a, 13 * size, 13)
        for k, count in ((0, 4), (4, 1), (5, 8)):
            call(f"accumulate{vectors}", rows, a[:, k:], 13 * size, w[k:], of_w, count, found, row)
        assert torch.equal(found[:rows], want), rows
        assert found[rows:].isnan().all()


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
def test_a_lone_row_in_blocks_is_a_row_of_many(vectors):
    """The same bits, wherever blocks begin and whichever part of the first has been summed before."""
    size, width = 4, lanes_of(torch.float32) * vectors
    x, h, w = torch.randn(13), torch.randn(30), torch.randn(43, width)
    init, zeros = torch.randn(1, width), torch.zeros(1, width)
    for block in (1, 5, 13, 20, 43, 50):
        columns, want, start = torch.cat([x, h]), torch.empty(1, width), init
        for k in range(0, 43, block):
            part = min(block, 43 - k)
            product(vectors, 1, start, 0, want, 0, w[k:], width * size, columns[k:], 0, part)
            start = want
        whole = torch.full((1, width), torch.nan)
        call(f"gemv{vectors}", 1, init, 0, whole, 0, x, w, 0, 13, h, w[13:], 0, 30, block, block, zeros, 0)
        assert torch.equal(whole, want), block
        done = 13 % block  # columns of x in the block in which h follows, after whole ones
        fed, part = init.clone(), zeros.clone()
        for k in range(0, 13 - done, block):
            product(vectors, 1, fed, 0, fed, 0, w[k:], width * size, x[k:], 0, block)
        if done:
            at = 13 - done
            product(vectors, 1, zeros, 0, part, 0, w[at:], width * size, x[at:], 0, done)
        whole.fill_(torch.nan)
        call(f"gemv{vectors}", 1, fed, 0, whole, 0, x, w, 0, 0, h, w[13:], 0, 30, block - done, block, part, 0)
        assert torch.equal(whole, want), block


@pytest.mark.parametrize("vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [1, -1])
def test_a_lone_row_takes_many_panels_to_and_fro(vectors, step):
    panels, width = 5, lanes_of(torch.float32) * vectors
    x, h, of_x, of_h = torch.randn(6), torch.randn(9), torch.randn(panels, 6, width), torch.randn(panels, 9, width)
    init, part, first = torch.randn(panels, width), torch.randn(panels, width), 0 if step == 1 else panels - 1
    want, found = torch.empty(panels, width), torch.full((panels, width), torch.nan)
    for p in range(panels):
        call(f"gemv{vectors}", 1, init[p], 0, want[p], 0, x, of_x[p], 0, 6, h, of_h[p], 0, 9, 3, 4, part[p], 0)
    row = step * width * 4
    call(
        f"gemv{vectors}", panels, init[first], row, found[first], row, x, of_x[first], 6 * row, 6, h, of_h[first],
        9 * row, 9, 3, 4, part[first], row,
    )  # fmt: skip
    assert torch.equal(found, want)
    expected = init.double() + part.double() + (x.double() @ of_x.double()) + (h.double() @ of_h.double())
    assert (found - expected).abs().max() < 1e-5  # fifteen terms of a few units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_past_the_caches(dtype):
    """They are written past them where they are many: the same bits."""
    lanes = lanes_of(dtype)
    pre, c_prev, found = torch.randn(6400 // lanes, 4, lanes, dtype=dtype), torch.randn(6400, dtype=dtype), []
    for name in ("cell_forward_saving", "cell_forward_streaming"):
        h, c, gates = (torch.full_like(a, torch.nan) for a in (c_prev, c_prev, pre))
        row = lanes * dtype.itemsize
        states = [n for a in (h, h, c_prev, c) for n in (a.data_ptr(), row)]  # of h_prev nothing is read
        values = (ctypes.c_int64 * len(states))(*states)
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(
            tasks.primitives(tasks.table_of(cells.lstm, dtype.itemsize))[name]
        )
        function(len(pre), 0, 0, pre.data_ptr(), gates.data_ptr(), ctypes.addressof(values))
        found.append([h, c, gates])
    assert all(map(torch.equal, *found))
    assert all(a.isfinite().all() for a in found[0])
