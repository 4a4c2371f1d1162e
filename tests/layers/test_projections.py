"""LSTMs with a projection: h has P units, and c has H.

The truth is `torch.nn.LSTM` with proj_size in float64, and with lengths or resets the backend `reference`, which other
tests compare with it. Sizes are such that P and H fill whole vectors, or parts of one or of several.
"""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import fastlstm
from tests.helpers.modules import REFERENCE, pair
from tests.helpers.tolerances import F64, close


def operands_of(module, T, B):
    """x and the initial states."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (T, B, module.input_size), (count, B, module.proj_size), (count, B, module.hidden_size)
    return [torch.randn(size) for size in sizes]


def test_second_derivatives():
    module = fastlstm.LSTM(2, 3, proj_size=2, backend="numba", dtype=F64)
    operands = [a.to(F64).requires_grad_() for a in operands_of(module, 3, 2)]
    names, weights = zip(*module.named_parameters())

    def call(x, h_0, c_0, *weights):
        output, last = functional_call(module, dict(zip(names, weights)), (x, (h_0, c_0)))
        return output, *last

    assert gradgradcheck(call, (*operands, *weights))


TRANSFORMS = {
    "forward mode": lambda f, x, weights: jvp(f, (x, weights), (x, weights))[1],
    "gradients of each sample": lambda f, x, weights: vmap(grad(lambda w, x: f(x, w).pow(2).sum()), (None, 1))(
        weights, x.unsqueeze(2)
    ),
    "several models": lambda f, x, weights: vmap(lambda scale: f(x, {k: scale * a for k, a in weights.items()}))(
        torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    ),
    "compiled": lambda f, x, weights: torch.compile(f, backend="aot_eager", fullgraph=True)(x, weights),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    exact, module = pair(3, 7, proj_size=4, like=REFERENCE, backend="numba")
    x = torch.randn(5, 4, 3, dtype=F64)
    results = []
    for each in (module, exact):
        weights = {k: a.detach() for k, a in each.named_parameters()}
        results.append(TRANSFORMS[transform](lambda x, w, m=each: functional_call(m, w, (x,))[0], x, weights))
    got, want = (list(a.values()) if isinstance(a, dict) else [a] for a in results)
    close(got, want, "derivatives")


def test_all_cell_states():
    exact, module = pair(3, 7, proj_size=4, like=REFERENCE, backend="numba")
    x = torch.randn(5, 4, 3, dtype=F64)
    close(module(x, return_cells=True)[2], exact(x, return_cells=True)[2], "values")
