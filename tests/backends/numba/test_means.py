"""Cells with means over units, in numba's kernels: a step runs in phases, over rows that go together.

What such cells compute is tested beside plain PyTorch in `tests.cells`. Here it is how the kernels split the work.
"""

import pytest
import torch

import fastlstm
from fastlstm.cells import cell, mean, rsqrt, sigmoid, tanh
from tests.helpers.tolerances import close


def normalized(*values):
    """Values minus their common mean, over their common deviation, as Ba et al. normalise all gates together."""
    center = sum(map(mean, values)) * (1.0 / len(values))
    values = [value - center for value in values]
    scale = rsqrt(sum(mean(value * value) for value in values) * (1.0 / len(values)) + 1e-5)
    return [value * scale for value in values]


@cell(gates={"i": "xh", "f": "xh", "g": "xh"}, states=("h", "c"), params=("gain",))
def norms(i, f, g, c, gain):
    i, f, g = normalized(i, f, g)
    c = sigmoid(f + 1.0) * c + sigmoid(i) * tanh(g)
    (scaled,) = normalized(c)
    return tanh(scaled * gain), c


@cell(gates={"a": "x"}, states=("h",))
def saves_means_alone(a, h):
    m = mean(a)
    return 0.5 * h + tanh(m * m)


@cell(gates={"a": "xh"}, states=("h",), inputs=("gap",))
def detached_mean(a, h, gap):
    return tanh(a + fastlstm.cells.stop_gradient(mean(h * gap)))


CELLS = [norms, saves_means_alone, detached_mean]


def operands(cell, T, B, I, H):
    torch.manual_seed(T * B * H)
    module = fastlstm.RNN(cell, I, H, backend="numba")
    inputs = tuple(torch.randn(T, B, H) for _ in cell.inputs)
    return module, torch.randn(T, B, I), tuple(torch.randn(1, B, H) for _ in cell.states), inputs


def named(module, inputs):
    return {"inputs": dict(zip(module.cell.inputs, inputs))} if inputs else {}


def results(module, x, states, inputs, **masks):
    """Outputs, last states, and the gradients of all that they depend on."""
    leaves = [a.detach().requires_grad_() for a in (x, *states, *inputs)]
    x, states, inputs = leaves[0], tuple(leaves[1 : 1 + len(states)]), tuple(leaves[1 + len(states) :])
    output, last = module(x, states, **named(module, inputs), **masks)
    ends = [output, *last]
    directions = [torch.linspace(-1, 1, a.numel()).view_as(a) for a in ends]
    return [*ends, *torch.autograd.grad(ends, [*leaves, *module.parameters()], directions)]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("size", [(3, 1, 5, 64), (3, 1, 5, 650), (4, 9, 7, 33), (2, 130, 5, 50)], ids=str)
def test_threads_do_not_change_bits(cell, size):
    module, *operand = operands(cell, *size)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(module, *operand))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("size", [(3, 5, 5, 64), (3, 70, 7, 33)], ids=str)
def test_a_row_does_not_depend_on_others(cell, size):
    module, x, states, inputs = operands(cell, *size)
    lengths = torch.randint(0, size[0] + 1, size[1:2])
    whole = results(module, x, states, inputs, lengths=lengths)
    for b in (0, size[1] // 2, size[1] - 1):
        rows = slice(b, b + 1)
        alone = module(
            x[:, rows],
            tuple(a[:, rows] for a in states),
            lengths=lengths[rows],
            **named(module, [a[:, rows] for a in inputs]),
        )
        for got, want in zip([alone[0], *alone[1]], whole):
            assert torch.equal(got, want[:, rows])
    with torch.no_grad():  # nothing is saved
        output, last = module(x, states, lengths=lengths, **named(module, inputs))
    assert all(map(torch.equal, [output, *last], whole))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 3, 1), (5, 3, 4, 7), (4, 50, 3, 100), (2, 2, 40, 650)], ids=str)
def test_as_in_plain_pytorch(poisoned, cell, masked, size):
    T, B, _, _ = size
    masks = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.3} if masked else {}
    module, *operand = operands(cell, *size)
    found = results(module, *operand, **masks)
    exact = fastlstm.RNN(cell, size[2], size[3], backend="reference", dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x, states, inputs = operand
    doubles = x.double(), tuple(a.double() for a in states), tuple(a.double() for a in inputs)
    close(found, results(exact, *doubles, **masks), "layer")


@cell(gates={"a": "xh"}, states=("h",), params=("row0", "sum0", "kept0"), inputs=("_head0",))
def names_of_phases(a, h, row0, sum0, kept0, _head0):
    (a,) = normalized(a * row0)
    return tanh(a * sum0 * kept0 + mean(h * _head0, of="head"))


def test_names_may_be_those_that_phases_use():
    module, x, states, inputs = operands(names_of_phases, 3, 5, 4, 20)
    exact = fastlstm.RNN(names_of_phases, 4, 20, backend="reference")
    exact.load_state_dict(module.state_dict())
    close(results(module, x, states, inputs), results(exact, x, states, inputs), "gradients")
