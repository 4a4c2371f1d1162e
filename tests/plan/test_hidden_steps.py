"""Outputs of held steps are zero, and nobody looks at their gradient, in training as in inference."""

import pytest
import torch

from fastlstm import lstm
from tests.helpers.tolerances import close

SIZES = [(2, 3, 5, 7), (40, 70, 6, 50), (30, 20, 9, 33), (70, 17, 4, 16), (12, 130, 7, 40), (9, 1, 3, 100)]


def results(tensors, lengths, weight, **options):
    """Outputs and last states, and gradients where the gradient of held outputs is NaN."""
    x, h_0, c_0, *weights = (a.detach().clone().requires_grad_() for a in tensors)
    output, (h_n, c_n) = lstm(x, (h_0, c_0), *weights, lengths=lengths, **options)
    past = (torch.arange(len(x)).unsqueeze(1) >= lengths).unsqueeze(-1)
    incoming = [weight.masked_fill(past, torch.nan), h_n.detach(), c_n.detach()]
    assert (output.masked_select(past) == 0).all()
    outputs = output.detach(), h_n.detach(), c_n.detach()
    return *outputs, *torch.autograd.grad((output, h_n, c_n), (x, h_0, c_0, *weights), incoming)


def layer(T, B, I, H, dtype):
    sizes = (T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)
    return [(torch.randn(*size) / (1 if n < 3 else H**0.5)).to(dtype) for n, size in enumerate(sizes)]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("often", [0.1, 0.7])
def test_held_steps_among_others(size, reverse, dtype, often, poisoned):
    """The state in which a row is held is its last or its first, which its outputs do not show."""
    T, B, _, H = size
    tensors, weight = layer(*size, dtype), torch.randn(T, B, H).to(dtype)
    lengths = torch.where(torch.rand(B) < often, torch.randint(0, T + 1, (B,)), T)
    masks = {"reset": torch.rand(T, B) < 0.3, "reverse": reverse}
    found = results(tensors, lengths, weight, backend="numba", **masks)
    want = results([a.double() for a in tensors], lengths, weight.double(), backend="reference", **masks)
    close(found, want, "long")
