"""Outputs of held steps are zero, and nobody looks at their gradient, in training as in inference."""

import pytest
import torch

import fastlstm
from fastlstm.backends.reference import HOLD
from fastlstm.functional import lstm
from tests.helpers.tolerances import close

SIZES = [(2, 3, 5, 7), (40, 70, 6, 50), (30, 20, 9, 33), (70, 17, 4, 16), (12, 130, 7, 40), (9, 1, 3, 100)]


def gradients(tensors, mask, weight, **options):
    """Outputs, and gradients where the gradient of held outputs is NaN."""
    x, h_0, c_0, *weights = (a.detach().clone().requires_grad_() for a in tensors)
    output, (h_n, c_n) = lstm(x, (h_0, c_0), *weights, mask=mask, **options)
    held = (mask == HOLD).unsqueeze(-1)
    incoming = [weight.masked_fill(held, torch.nan), h_n.detach(), c_n.detach()]
    return output.detach(), *torch.autograd.grad((output, h_n, c_n), (x, h_0, c_0, *weights), incoming)


def layer(T, B, I, H, dtype):
    sizes = (T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)
    return [(torch.randn(*size) / (1 if n < 3 else H**0.5)).to(dtype) for n, size in enumerate(sizes)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("often", [0.1, 0.7])
def test_held_steps_among_others(size, reverse, dtype, often, poisoned):
    """A row that goes on after held steps does so from the state it was held in, which its outputs do not show."""
    T, B, _, H = size
    tensors, weight = layer(*size, dtype), torch.randn(T, B, H).to(dtype)
    mask = torch.where(torch.rand(T, B) < often, HOLD, torch.randint(0, 2, (T, B))).int()
    found = gradients(tensors, mask, weight, reverse=reverse, backend="numba")
    wide = [a.double() for a in tensors]
    want = gradients(wide, mask, weight.double(), reverse=reverse, backend="reference")
    assert (found[0][mask == HOLD] == 0).all()
    close(found, want, "long")


@pytest.mark.parametrize("reverse", [False, True])
def test_second_derivatives(reverse):
    T, B, I, H = 6, 4, 3, 5
    x, *others = layer(T, B, I, H, torch.double)
    mask = torch.randint(0, 3, (T, B)).int()
    weight, along = torch.randn(T, B, H).double(), torch.randn(T, B, I).double()
    results = []
    for backend in ("numba", "reference"):
        leaves = [a.clone().requires_grad_() for a in (x, *others)]
        output, (h_n, _) = lstm(leaves[0], leaves[1:3], *leaves[3:], mask=mask, reverse=reverse, backend=backend)
        loss = (output.square() * weight).sum() + h_n.square().sum()
        (dx,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
        results.append(torch.autograd.grad((dx * along).sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_of_outputs_changed_in_place():
    module, lengths = fastlstm.LSTM(3, 4, dtype=torch.double), torch.tensor([5, 2])
    past, results = (torch.arange(5)[:, None] >= lengths).unsqueeze(-1), []
    x = torch.randn(5, 2, 3, dtype=torch.double, requires_grad=True)
    for change in (torch.Tensor.masked_fill_, torch.Tensor.masked_fill):
        output = change(module(x, lengths=lengths)[0], past, 2.0)
        (dx,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), list(module.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_may_be_changed_in_place(dtype):
    """As those of `pad_packed_sequence`: whoever takes the largest of each row's outputs writes to its padding."""
    module, lengths = fastlstm.LSTM(5, 8, dtype=dtype), torch.tensor([7, 3, 5])
    x, past = torch.randn(7, 3, 5, dtype=dtype), (torch.arange(7)[:, None] >= lengths).unsqueeze(-1)
    results = []
    for change in (torch.Tensor.masked_fill_, torch.Tensor.masked_fill):
        output = change(module(x, lengths=lengths)[0], past, float("-inf"))
        results.append(torch.autograd.grad(output.max(0).values.sum(), list(module.parameters())))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
