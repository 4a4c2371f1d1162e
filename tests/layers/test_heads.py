"""Layers of heads are dense layers whose weight_hh is block-diagonal."""

import pytest
import torch

import fastlstm
from fastlstm.cells import gru, lstm, slstm


def blocks(weight: torch.Tensor, K: int) -> torch.Tensor:
    """(Y, K, D, D) of the blocks of a dense (Y H, H), as a view."""
    D = weight.shape[1] // K
    return weight.view(-1, K, D, K, D).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("cell", [lstm, gru, slstm])
@pytest.mark.parametrize("H, K", [(128, 4), (60, 4), (24, 3), (12, 12)])
@pytest.mark.parametrize("T, B, I", [(1, 1, 9), (7, 1, 70), (9, 3, 5), (12, 130, 5)])
def test_heads_are_blocks(backend, cell, H, K, T, B, I):
    torch.manual_seed(0)
    heads = fastlstm.RNN(cell, I, H, heads=K, backend=backend)
    dense = fastlstm.RNN(cell, I, H, backend="reference", dtype=torch.float64)
    assert heads.weight_hh_l0.shape[1] == H // K
    with torch.no_grad():
        for a, b in zip(dense.parameters(), heads.parameters()):
            if a.shape == b.shape:
                a.copy_(b)
            else:
                blocks(a.zero_(), K).copy_(b.view(-1, K, H // K, H // K))
    x = torch.randn(T, B, I)
    results = []
    for module, x_in in (heads, x.requires_grad_()), (dense, x.detach().double().requires_grad_()):
        start = tuple(torch.full((1, B, H), 0.3, dtype=x_in.dtype) for _ in cell.states)
        output, last = module(x_in, start)
        (output.pow(2).sum() + sum(a.sum() for a in last)).backward()
        results.append([output, *last, x_in.grad, *(a.grad for a in module.parameters())])
    for found, wanted in zip(*results):
        if found.shape != wanted.shape:
            wanted = blocks(wanted, K).reshape(found.shape)
        scale = wanted.abs().max() + 1e-3
        torch.testing.assert_close(found.double() / scale, wanted / scale, rtol=0, atol=1e-4)
