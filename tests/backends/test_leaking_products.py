"""Padding, and states of rows without steps, where torch's products of bfloat16 leak NaN into the row before."""

import pytest
import torch

import fastlstm
from tests.helpers.layers import BACKENDS
from tests.helpers.leaking import leaking_products
from tests.helpers.modules import called, inputs_of
from tests.helpers.tolerances import equal

T, B, I, H = 5, 5, 7, 33  # odd, and so is T B, the number of terms of a weight's gradient
LENGTHS = torch.tensor([5, 0, 2, 1, 3])


@pytest.fixture(autouse=True)
def leaking():
    with leaking_products():
        yield


def test_the_products_leak():
    """In every way that torch multiplies, where K is odd."""
    linear = torch.nn.functional.linear
    for K, leaks in ((I, True), (I + 1, False)):
        x, weight = torch.ones(1, 3, K, dtype=torch.bfloat16), torch.ones(2, K, dtype=torch.bfloat16)
        x[0, 2, 0] = torch.nan
        ways = x @ weight.mT, linear(x, weight), linear(x, weight, weight[:, 0]), torch.einsum("abk,nk->abn", x, weight)
        for a in ways:
            assert a[0].isnan().all(1).tolist() == [False, leaks, True]
        assert not (x.float() @ weight.float().mT)[0, 1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("backend", [*BACKENDS, "aten"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_what_no_step_reads_reaches_nothing(kind, backend, dtype):
    """Results and gradients with NaN in its place are those with zeros."""
    module = getattr(fastlstm, kind)(I, H, bidirectional=True, dtype=dtype, backend=backend)
    inputs, (held, empty) = inputs_of(module, T, B), (torch.arange(T).unsqueeze(1) >= LENGTHS, LENGTHS == 0)
    masks, found = [held, *[empty] * (len(inputs) - 1)], []
    for value in (torch.nan, 0.0):
        x, *states = leaves = [a.masked_fill(m.unsqueeze(-1), value).requires_grad_() for a, m in zip(inputs, masks)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            output, *last = called(module, x, states, lengths=LENGTHS)
        last = [a[:, ~empty] for a in last]  # an empty row's are its first
        loss = sum((a.float() * torch.linspace(-1, 1, a.numel()).view_as(a)).sum() for a in (output, *last))
        found.append([output, *last, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
    equal(*found)
