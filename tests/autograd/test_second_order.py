"""Derivatives beyond the first: what `test_any_transform.py` does not draw."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacrev, jvp

import fastlstm
from fastlstm import cells
from tests.helpers.calls import Calls
from tests.helpers.layers import Layer
from tests.helpers.modules import REFERENCE, pair, randn
from tests.helpers.tolerances import close
from tests.helpers.transforms import backends, backends_but_slow, dtype_of


def test_nested_dual_numbers_are_refused():
    """Torch's own limit; what must not happen is an answer."""
    lstm, x = fastlstm.LSTM(3, 4), torch.randn(5, 2, 3)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Nested forward mode"):
        jvp(lambda a: lstm(a)[0], (forward_ad.make_dual(x, x),), (x,))


@backends_but_slow
@pytest.mark.parametrize("which", ["hessian", "jacobian"])
def test_vectorized_functional(backend, which):
    """torch.autograd.functional batches with rules of its own, which know fewer operators than vmap's."""
    dtype = dtype_of(backend)
    exact, lstm = pair(3, 4, like=REFERENCE, dtype=dtype, backend=backend)
    x = torch.randn(2, 2, 3, dtype=dtype)
    loss = lambda module: lambda a: module(a)[0].pow(3).sum(0)  # noqa: E731
    total = lambda module: lambda a: loss(module)(a).sum()  # noqa: E731
    for mode in ("reverse-mode", "forward-mode"):
        if which == "hessian":
            got = torch.autograd.functional.hessian(total(lstm), x, vectorize=True, outer_jacobian_strategy=mode)
            want = hessian(total(exact))(x.double())
        else:
            got = torch.autograd.functional.jacobian(loss(lstm), x, vectorize=True, strategy=mode)
            want = jacrev(loss(exact))(x.double())
        close([got], [want], "derivatives")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_sixteen_bits(dtype, options):
    """Near those of float64. First derivatives have tests in `tests/backends/`."""
    exact, module = pair(4, 5, like=REFERENCE, dtype=dtype, **options)
    exact.load_state_dict(module.state_dict())
    x, found = torch.randn(6, 3, 4).to(dtype), []
    for each in (module, exact):
        inputs = [x.to(each.weight_ih_l0.dtype).requires_grad_(), *each.parameters()]
        first = torch.autograd.grad(each(inputs[0])[0].pow(2).sum(), inputs, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.double().pow(2).sum() for g in first), inputs)])
    close(*found, "long")


@backends
def test_the_first_backward_pays_nothing_for_a_second(backend, monkeypatch):
    """With create_graph and without it, no kernel runs but the forward and the backward pass."""
    layer, calls = Layer(4, 3, 5, 6), Calls(monkeypatch, backend).names
    inputs = layer.to(dtype_of(backend))
    torch.autograd.grad(layer.run(inputs, backend)[0].sum(), inputs)
    assert calls == ["forward", "backward"]
    calls.clear()
    (gradient,) = torch.autograd.grad(layer.run(inputs, backend)[0].sum(), inputs[:1], create_graph=True)
    assert calls == ["forward", "backward"]
    calls.clear()
    gradient.sum().backward()
    # of what h and c got, and the pass that is differentiated, which is the reference's
    assert calls == ["backward"] * (1 + (backend == "reference"))


@cells.cell(gates={}, states=("h",), params=("u",), inputs=("a",))
def stateless(h, u, a):
    return cells.tanh(u * a)


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_a_cell_that_reads_no_state(backend):
    """It has no gate either, so that a step reads its inputs and params alone."""
    rnn = fastlstm.RNN(stateless, 0, 5, dtype=torch.double, backend=backend)
    a, tangent = torch.randn(2, 4, 3, 5, dtype=torch.double).unbind()
    ours, truth = lambda a: rnn(None, None, {"a": a})[0], lambda a: torch.tanh(rnn.u_l0 * a)
    results = []
    for f in (ours, truth):
        along = jvp(f, (a,), (tangent,))
        inputs = [a.clone().requires_grad_(), rnn.u_l0]
        gradients = torch.autograd.grad(f(inputs[0]).pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), inputs)
        results.append([*along, *gradients, *second])
    close(*results, "derivatives")


def test_second_derivatives_of_a_projection():
    module = fastlstm.LSTM(2, 3, proj_size=2, backend="numba", dtype=torch.double)
    operands = [randn(3, 2, 2), randn(1, 2, 2), randn(1, 2, 3)]
    names, weights = zip(*module.named_parameters())

    def call(x, h_0, c_0, *weights):
        output, last = functional_call(module, dict(zip(names, weights)), (x, (h_0, c_0)))
        return output, *last

    assert torch.autograd.gradgradcheck(call, (*operands, *weights))
