"""The same bits: in every run, for a row alone, and for a sequence in chunks."""

import itertools

import pytest
import torch

import fastlstm
from fastlstm import lstm
from tests.helpers.layers import needs_native
from tests.helpers.tolerances import equal
from tests.helpers.transforms import BACKENDS, needs_triton

SHAPES = [(7, 70, 28, 128), (5, 3, 7, 65)]  # the first large enough for two threads
SMALL = (3, 9, 5, 20)  # for Triton's interpreter; two programs of batch rows


def gradients(lstm, x, direction):
    output, (h_n, c_n) = lstm(x)
    return output, h_n, c_n, *torch.autograd.grad(output, [x, *lstm.parameters()], direction)


@needs_triton
@pytest.mark.parametrize("backend", ["triton-ieee"], indirect=True)
def test_a_row_alone(backend):
    """Of the outputs and of everything that belongs to the row; sums over rows have their own order.

    torch does the products with x and with dpreact, and may sum in another order for another number of rows: what is
    left is float32's rounding. `tests/backends/test_plans.py` has the kernels of a CPU, which leave no bit.
    """
    T, B, I, H = SMALL
    lstm, x = fastlstm.LSTM(I, H, backend=backend), torch.randn(T, B, I, requires_grad=True)
    direction = torch.randn(T, B, H)
    output, h_n, c_n, dx, *_ = gradients(lstm, x, direction)
    for b in {0, 1, B // 2, B - 1}:
        row = slice(b, b + 1)
        alone = gradients(lstm, x[:, row].detach().requires_grad_(), direction[:, row])
        torch.testing.assert_close(alone[:4], (output[:, row], h_n[:, row], c_n[:, row], dx[:, row]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("native", marks=needs_native)], indirect=True)
@pytest.mark.parametrize("bounds", [(0, 1, 7), (0, 3, 4, 7)])
def test_a_sequence_in_chunks(backend, bounds):
    """torch's product over all steps at once, outside the numba kernel, may sum in another order for other rows."""
    H = 20 if backend == "triton-ieee" else 65
    lstm, x, state, outputs = fastlstm.LSTM(28, H, backend=backend), torch.randn(7, 5, 28), None, []
    whole, ends = lstm(x)
    for first, last in itertools.pairwise(bounds):
        output, state = lstm(x[first:last], state)
        outputs.append(output)
    if backend in ("numba", "native"):
        equal([torch.cat(outputs), *state], [whole, *ends])
    else:
        torch.testing.assert_close(torch.cat(outputs), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("I", "H"), [(33, 40), (7, 40), (150, 130)])
def test_few_rows_alone(I, H, reverse, masked):
    """Few rows take x of many steps at once; a row has the bits that it has among many, or in a sequence's pieces."""
    x = torch.randn(20, 70, I).transpose(0, 1)  # rows and steps with strides of their own
    weights = [torch.randn(4 * H, n) * H**-0.5 for n in (I, H)]
    lengths, reset = torch.randint(0, 71, (20,)), torch.rand(70, 20) < 0.3

    def run(steps, rows, hx=None):
        first, last, _ = steps.indices(70)
        ends = (lengths[rows] - first).clamp(0, last - first)
        masks = {"lengths": ends, "reset": reset[steps, rows]} if masked else {}
        return lstm(x[steps, rows], hx, *weights, reverse=reverse, backend="numba", **masks)

    whole, all_steps = run(slice(None), slice(None))[0], slice(None)
    for rows in (slice(0, 1), slice(5, 8), slice(12, 20)):
        assert torch.equal(run(all_steps, rows)[0], whole[:, rows])
        outputs, state, pieces = [], None, [slice(0, 1), slice(1, 34), slice(34, 70)]
        for steps in reversed(pieces) if reverse else pieces:
            output, state = run(steps, rows, state)
            outputs.append(output)
        assert torch.equal(torch.cat(outputs[::-1] if reverse else outputs), whole[:, rows])


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


def test_a_sequence_in_steps():
    lstm, x, state = fastlstm.LSTM(28, 65, backend="numba"), torch.randn(7, 5, 28), None
    for x_t, h in zip(x, lstm(x)[0]):
        output, state = lstm.step(x_t, state)
        assert torch.equal(output, h)
