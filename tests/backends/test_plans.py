"""Calls of the CPU's kernels beside plain PyTorch in float64: the first of a signature, and those that follow its plan.

Sums of the bits are compared where they must not depend on how a call is made. A test with weights that others write
to is in `tests/plan`.
"""

import copy

import pytest
import torch

import fastlstm
from tests.helpers.calls import Calls
from tests.helpers.layers import CPU_BACKENDS, needs_native
from tests.helpers.modules import called, inputs_of, modules_of, results, same
from tests.helpers.numba import needs_pieces, needs_unit
from tests.helpers.tolerances import F32, F64, close

F16 = torch.float16
NATIVE = [pytest.param(kind, "native", marks=needs_native) for kind in (fastlstm.LSTM, fastlstm.GRU)]
KINDS = [(fastlstm.LSTM, "numba"), (fastlstm.GRU, "numba"), *NATIVE]
each_kind = pytest.mark.parametrize(("kind", "backend"), KINDS)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *KINDS,
        pytest.param(fastlstm.LSTM, "numba-bf16", marks=needs_unit),
        *(pytest.param(fastlstm.LSTM, f"numba-{name}", marks=needs_pieces) for name in ("bf16x3", "bf16x6")),
    ],
)
def test_one_gradient_alone(kind, backend):
    """Also where it is the first that packs weights to keep them, of which it may not read all; and of one output."""
    for T, B, I, H in ((1, 5, 40, 33), (1, 7, 40, 1), (6, 5, 40, 33), (1, 3, 650, 100)):
        module = kind(I, H, backend=backend)
        inputs = inputs_of(module, T, B)
        directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
        tensors = [*inputs, *module.parameters()]
        everything = results(module, inputs, directions)[len(directions) :]
        for n, wanted in enumerate(tensors):
            fresh = copy.deepcopy(module)
            tensors = [a.detach() for a in inputs] + list(fresh.parameters())
            for k, a in enumerate(tensors):
                a.requires_grad_(k == n)
            outputs = called(fresh, tensors[0], tensors[1 : len(inputs)])
            (got,) = torch.autograd.grad(outputs, tensors[n], directions)
            assert torch.equal(got, everything[n]), (n, wanted.shape)
            tensors[n].requires_grad_(False)
    for k in range(len(directions)):
        inputs = [a.detach().requires_grad_() for a in inputs]
        outputs = called(module, inputs[0], inputs[1:])
        zeros = [a if n == k else torch.zeros_like(a) for n, a in enumerate(directions)]
        absent = torch.autograd.grad(outputs[k], inputs, directions[k], retain_graph=True)
        assert same(absent, torch.autograd.grad(outputs, inputs, zeros))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("I", "H"), [(200, 272), (17, 528), (100, 650)])
def test_large_weights_of_one_step(I, H, dtype, masked, poisoned, monkeypatch):
    """Few rows read them where they lie, and have the bits of many rows, whose weights are packed."""
    module, exact = modules_of(fastlstm.LSTM, "numba", I, H, dtype)
    inputs, calls = inputs_of(module, 1, 40), Calls(monkeypatch, "numba")
    with torch.no_grad():
        called(module, inputs[0][:, :1], [a[:, :1] for a in inputs[1:]])
    assert calls.count("pack") == 0
    lengths = torch.randint(0, 2, (40,)) if masked else torch.ones(40, dtype=torch.int64)
    lengths[1] = not masked
    inputs[0][:, lengths == 0] = torch.nan
    directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
    many = results(module, inputs, directions, lengths=lengths)
    close(many, results(exact, inputs, directions, lengths=lengths), "long")
    for rows in (slice(0, 1), slice(1, 2), slice(2, 6), slice(8, 40)):
        few, of_rows = [a[:, rows] for a in inputs], [a[:, rows] for a in directions]
        got = results(module, few, of_rows, lengths=lengths[rows])
        assert same(got[:6], [a[:, rows] for a in many[:6]])  # to the gradients of the states
        with torch.no_grad():
            assert same(called(module, few[0], few[1:], lengths=lengths[rows]), got[:3])
        close(got, results(exact, few, of_rows, lengths=lengths[rows]), "long")


@pytest.mark.parametrize("which", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_bias_alone(backend, T, which):
    tensors, found = [torch.randn(*size, dtype=F64) for size in ((T, 3, 7), (132, 7), (132, 33), (132,))], []
    for name in (backend, backend, "reference"):
        x, *weights, bias = (a.clone().requires_grad_() for a in tensors)
        output, (_, c_n) = fastlstm.lstm(x, None, *weights, **{which: bias}, backend=name)
        found.append([output, c_n, *torch.autograd.grad((output * 2).sum() + c_n.sum(), [x, *weights, bias])])
    assert same(*found[:2])
    close(found[0], found[2], "gradients")
