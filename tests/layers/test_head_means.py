"""Means over the units of a head: ``mean(v, of="head")`` and norms of heads, in layers with ``heads=K``.

`test_rnn_calls.py` has their derivatives.
"""

import re

import pytest
import torch

import fastlstm
from fastlstm.cells import cell, mean, tanh
from tests.helpers.rnn import of_heads, of_heads_and_rows
from tests.helpers.tolerances import F64, close

backends = pytest.mark.parametrize("backend", ["numba", "reference"])


@backends
def test_a_step_of_both_by_hand(backend):
    B, K, D = 5, 3, 4
    rnn = fastlstm.RNN(of_heads_and_rows, 2, K * D, heads=K, dtype=F64, backend=backend)
    x, c, u = torch.randn(1, B, 2, dtype=F64), torch.randn(B, K * D, dtype=F64), torch.randn(1, B, K * D, dtype=F64)
    _, (h_1, c_1) = rnn(x, (torch.zeros(1, B, K * D, dtype=F64), c[None]), {"u": u})

    def of_head(a):
        return a.view(B, K, D).mean(-1, keepdim=True).expand(B, K, D).reshape(B, K * D)

    a = x[0] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0
    b = rnn.bias_hh_l0.expand(B, -1)
    c = (a - a.mean(-1, keepdim=True)).sigmoid() * c + (b - of_head(b)).tanh() + u[0]
    m = of_head((-c * c).exp() + of_head(rnn.p_l0 * c))
    close([h_1[0], c_1[0]], [(c * m - (m * c).mean(-1, keepdim=True)).tanh(), c], "sums")


def test_a_mean_of_what_is_said():
    for other in ("heads", None, -1):
        with pytest.raises(ValueError, match=re.escape(f'of must be "row" or "head", got {other!r}')):
            mean(torch.ones(3), of=other)
    with pytest.raises(ValueError, match="the name heads is used twice or reserved"):
        cell(gates={"a": "xh"}, states=("h",), params=("heads",))(lambda a, heads: tanh(a) * heads)
    printed = str(of_heads.derived())
    assert "mean_of_head(n_pre, heads)" in printed
    assert mean(2.0, of="head") == 2.0


def test_means_of_means_are_taken_once():
    @cell(gates={"a": "xh"}, states=("h",))
    def thrice(a):
        return tanh(a - mean(mean(mean(a, of="head"), of="head"))) + mean(mean(a), of="head")

    assert thrice.derived().forward.operations()["mean"] == 2
    assert thrice.derived().forward.operations()["mean_of_head"] == 1
