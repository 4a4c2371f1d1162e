"""The same bits: in every run, for a row alone, and for a sequence in chunks."""

import itertools

import pytest
import torch

import fastlstm
from tests.helpers.tolerances import equal
from tests.helpers.transforms import TRITON, needs_triton

SMALL = (3, 9, 5, 20)  # for Triton's interpreter; two programs of batch rows


def gradients(lstm, x, direction):
    output, (h_n, c_n) = lstm(x)
    return output, h_n, c_n, *torch.autograd.grad(output, [x, *lstm.parameters()], direction)


@needs_triton
@pytest.mark.parametrize("backend", ["triton-ieee"], indirect=True)
def test_a_row_alone(backend):
    """Of the outputs and of everything that belongs to the row; sums over rows have their own order.

    torch does the products with x and with dpreact, and may sum in another order for another number of rows: what is
    left is float32's rounding. `tests/backends/test_properties.py` has the kernels of a CPU, which leave no bit.
    """
    T, B, I, H = SMALL
    lstm, x = fastlstm.LSTM(I, H, backend=backend), torch.randn(T, B, I, requires_grad=True)
    direction = torch.randn(T, B, H)
    output, h_n, c_n, dx, *_ = gradients(lstm, x, direction)
    for b in {0, 1, B // 2, B - 1}:
        row = slice(b, b + 1)
        alone = gradients(lstm, x[:, row].detach().requires_grad_(), direction[:, row])
        torch.testing.assert_close(alone[:4], (output[:, row], h_n[:, row], c_n[:, row], dx[:, row]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", TRITON], indirect=True)
@pytest.mark.parametrize("bounds", [(0, 1, 7), (0, 3, 4, 7)])
def test_a_sequence_in_chunks(backend, bounds):
    """torch's product over all steps at once, outside the CPU's kernels, may sum in another order for other rows."""
    H = 20 if backend == "triton-ieee" else 65
    lstm, x, state, outputs = fastlstm.LSTM(28, H, backend=backend), torch.randn(7, 5, 28), None, []
    whole, _ = lstm(x)
    for first, last in itertools.pairwise(bounds):
        output, state = lstm(x[first:last], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=0, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_row_alone_in_sixteen_bits(backend):
    """Up to 32 inputs the kernel does the input's product too: then a row's outputs have the same bits alone.

    Those of chunks have not: the cell state that is returned between them is rounded to 16 bits.
    """
    lstm, x = fastlstm.LSTM(28, 20, backend=backend, dtype=torch.float16), torch.randn(5, 11, 28, dtype=torch.float16)
    with torch.no_grad():
        whole, (h_n, c_n) = lstm(x)
        for b in (0, 7, 8, 10):
            row = slice(b, b + 1)
            output, (h, c) = lstm(x[:, row])
            equal([output, h, c], [whole[:, row], h_n[:, row], c_n[:, row]])
