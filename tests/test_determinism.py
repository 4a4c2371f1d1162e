"""The same bits: in every run, for a row alone, and for a sequence in chunks."""

import itertools

import pytest
import torch

import fastlstm

SHAPES = [(7, 70, 28, 128), (5, 3, 7, 65)]  # the first large enough for two threads


backends = pytest.mark.parametrize("backend", ["numba", "reference"])


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(lstm, x, direction):
    output, (h_n, c_n) = lstm(x)
    return output, h_n, c_n, *torch.autograd.grad(output, [x, *lstm.parameters()], direction)


@pytest.mark.parametrize(("backend", "size"), [("numba", SHAPES[0]), ("numba", SHAPES[1]), ("reference", SHAPES[1])])
def test_a_hundred_runs(deterministic, backend, size):
    T, B, I, H = size
    lstm, x = fastlstm.LSTM(I, H, backend=backend), torch.randn(T, B, I, requires_grad=True)
    direction = torch.randn(T, B, H)
    first = gradients(lstm, x, direction)
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(gradients(lstm, x, direction), first))


@pytest.mark.parametrize("size", SHAPES)
def test_a_row_alone(size):
    """Of the outputs and of everything that belongs to the row; sums over rows have their own order."""
    T, B, I, H = size
    lstm, x = fastlstm.LSTM(I, H, backend="numba"), torch.randn(T, B, I, requires_grad=True)
    direction = torch.randn(T, B, H)
    output, h_n, c_n, dx, *_ = gradients(lstm, x, direction)
    for b in {0, 1, B // 2, B - 1}:
        row = slice(b, b + 1)
        alone = gradients(lstm, x[:, row].detach().requires_grad_(), direction[:, row])
        for got, want in zip(alone, (output[:, row], h_n[:, row], c_n[:, row], dx[:, row])):
            assert torch.equal(got, want)


@backends
@pytest.mark.parametrize("bounds", [(0, 1, 7), (0, 3, 4, 7)])
def test_a_sequence_in_chunks(backend, bounds):
    """The reference's product over all steps at once may sum in another order for another number of rows."""
    lstm, x, state, outputs = fastlstm.LSTM(28, 65, backend=backend), torch.randn(7, 5, 28), None, []
    whole, ends = lstm(x)
    for first, last in itertools.pairwise(bounds):
        output, state = lstm(x[first:last], state)
        outputs.append(output)
    if backend == "numba":
        assert torch.equal(torch.cat(outputs), whole)
        assert all(torch.equal(a, b) for a, b in zip(state, ends))
    else:
        torch.testing.assert_close(torch.cat(outputs), whole, rtol=0, atol=1e-6)


def test_a_sequence_in_steps():
    lstm, x, state = fastlstm.LSTM(28, 65, backend="numba"), torch.randn(7, 5, 28), None
    whole = lstm(x)[0]
    for t in range(7):
        output, state = lstm.step(x[t], state)
        assert torch.equal(output, whole[t])
