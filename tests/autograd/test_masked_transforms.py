"""Resets and lengths under torch's transforms: what a module adds to a layer with masks."""

import pytest
import torch
from torch.func import grad, vmap

from tests.helpers.modules import REFERENCE, pair
from tests.helpers.transforms import backends_but_slow, dtype_of, needs_triton

T, B = 5, 4
MASKS = {
    "reset": {"reset": torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]]) > 0},
    "lengths": {"lengths": torch.tensor([5, 0, 2, 4])},
}
# What a mask is to the Triton kernels has tests of its own.
cases = pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("numba", "reset"),
        ("numba", "lengths"),
        ("reference", "reset"),
        ("reference", "lengths"),
        pytest.param("triton-ieee", "lengths", marks=[needs_triton, pytest.mark.slow]),
        pytest.param("triton-ieee", "reset", marks=[needs_triton, pytest.mark.slow]),
    ],
    indirect=["backend"],
)


@pytest.fixture
def modules(backend):
    """The reference in float64 and ours in the backend's dtype."""
    return pair(3, 4, num_layers=2, like=REFERENCE, dtype=dtype_of(backend), backend=backend)


@backends_but_slow
@pytest.mark.parametrize("name", MASKS)
def test_each_sample_its_own_mask(modules, name):
    """vmap over inputs and masks together: gradients and outputs of a loop."""
    lstm, dtype = modules[1], modules[1].weight_ih_l0.dtype
    x = torch.randn(3, T, B, 3, dtype=dtype)
    given = torch.stack([MASKS[name][name].roll(k, -1) for k in range(3)])

    def run(x, mask):
        return lstm(x, **{name: mask})[0]

    def gradient(x, mask):
        return grad(lambda x: run(x, mask).pow(2).sum())(x)

    for function in (run, gradient):
        got = vmap(function)(x, given)
        torch.testing.assert_close(got, torch.stack([function(*each) for each in zip(x, given)]))


@cases
def test_exported(modules, name):
    lstm, mask = modules[1], MASKS[name]
    x = torch.randn(T, B, 3, dtype=lstm.weight_ih_l0.dtype)
    program = torch.export.export(lstm, (x,), mask).module()
    leaf = x.clone().requires_grad_()
    results = [f(leaf, **mask)[0] for f in (program, lstm)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(r.pow(2).sum(), leaf)[0] for r in results))
