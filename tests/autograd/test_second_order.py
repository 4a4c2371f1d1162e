"""Derivatives beyond the first, against float64: autograd over the reference's steps, or torch.nn.LSTM's own."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap

import fastlstm
from fastlstm import cells
from tests.helpers.calls import Calls
from tests.helpers.layers import Layer, needs_native
from tests.helpers.modules import REFERENCE, pair
from tests.helpers.tolerances import close
from tests.helpers.transforms import backends, backends_but_slow, dtype_of, needs_triton


@pytest.fixture
def modules(backend):
    """torch.nn.LSTM in float64 and ours in the backend's dtype."""
    return pair(4, 5, num_layers=2, bidirectional=True, dtype=dtype_of(backend), backend=backend)


@backends_but_slow
def test_gradient_penalty(modules):
    """A WGAN-GP critic's step."""
    inputs = torch.randn(6, 3, 4), torch.randn(6, 3, 4), torch.rand(3, 1)
    results = []
    for critic in modules:
        real, fake, mix = (a.to(next(critic.parameters()).dtype) for a in inputs)
        x = (mix * real + (1 - mix) * fake).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x)[0][-1].sum(), x, create_graph=True)
        penalty = ((gradient.transpose(0, 1).flatten(1).norm(dim=1) - 1) ** 2).mean()
        loss = critic(fake)[0][-1].mean() - critic(real)[0][-1].mean() + 10 * penalty
        results.append(torch.autograd.grad(loss, [*critic.parameters(), x]))
    close(results[1], results[0], "derivatives")


@backends_but_slow
def test_a_step_that_learns_from_a_step(modules):
    """MAML: the loss after one step of descent, differentiated by the weights before it."""
    x = torch.randn(6, 3, 4)

    def meta_gradient(module):
        names = [name for name, _ in module.named_parameters()]
        parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]

        def loss(parameters):
            return functional_call(module, dict(zip(names, parameters)), (x.to(parameters[0].dtype),))[0].pow(2).sum()

        gradients = torch.autograd.grad(loss(parameters), parameters, create_graph=True)
        return torch.autograd.grad(loss([p - 0.1 * g for p, g in zip(parameters, gradients)]), parameters)

    close(meta_gradient(modules[1]), meta_gradient(modules[0]), "derivatives")


@pytest.mark.parametrize(
    ("backend", "special"),
    [
        ("numba", False),
        ("numba", True),
        ("reference", False),
        ("reference", True),
        pytest.param("triton-ieee", True, marks=[needs_triton, pytest.mark.slow]),
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize(
    "third",
    [
        lambda f, n: jacrev(jacrev(jacrev(f, n), n), n),
        lambda f, n: jacfwd(jacrev(jacrev(f, n), n), n),
        lambda f, n: jacrev(jacfwd(jacrev(f, n), n), n),
        lambda f, n: jacrev(jacrev(jacfwd(f, n), n), n),
        lambda f, n: jacfwd(jacfwd(jacrev(f, n), n), n),
    ],
    ids=["rrr", "frr", "rfr", "rrf", "ffr"],
)
def test_third_derivatives(backend, special, third):
    layer = Layer(3, 1, 2, 4, reverse=special, masked=special)
    inputs, exact = (layer.to(dtype, requires_grad=False) for dtype in (dtype_of(backend), torch.double))
    ours = lambda *a: sum((out**3).sum() for out in layer.run(list(a), backend))  # noqa: E731
    truth = lambda *a: sum((out**3).sum() for out in layer.truth(list(a)))  # noqa: E731
    close([third(ours, 1)(*inputs)], [third(truth, 1)(*exact)], "derivatives")


@pytest.mark.parametrize(
    ("backend", "k"),
    [
        ("numba", 4),
        pytest.param("native", 0, marks=needs_native),
        ("reference", 1),
        pytest.param("triton-ieee", 4, marks=needs_triton),
    ],
    indirect=["backend"],
)
def test_forward_over_forward(backend, k):
    """Nested forward levels give zeros through any autograd Function: here they must not."""
    layer = Layer(3, 2, 3, 2)
    inputs, exact = (layer.to(dtype, requires_grad=False) for dtype in (dtype_of(backend), torch.double))
    ours = lambda *a: sum((out**3).sum() for out in layer.run(list(a), backend))  # noqa: E731
    truth = lambda *a: sum((out**3).sum() for out in layer.truth(list(a)))  # noqa: E731
    want = jacrev(jacrev(truth, k), k)(*exact)
    assert want.abs().max() > 1e-3
    close([jacfwd(jacfwd(ours, k), k)(*inputs)], [want], "derivatives")
    tangents = torch.randn(64, *inputs[k].shape)
    at = lambda a: ours(*inputs[:k], a, *inputs[k + 1 :])  # noqa: E731
    twice = lambda t: jvp(lambda a: jvp(at, (a,), (t,))[1], (inputs[k],), (t,))[1]  # noqa: E731
    along = tangents.double().flatten(1)
    wanted = ((along @ want.reshape(inputs[k].numel(), -1)) * along).sum(1)
    close([vmap(twice)(tangents.to(inputs[k].dtype))], [wanted], "derivatives")


@backends
def test_reverse_over_dual_numbers(backend):
    layer = Layer(3, 2, 3, 2)
    inputs, exact = layer.to(dtype_of(backend)), layer.to(torch.double)
    loss = lambda run, a: sum((out**3).sum() for out in run(a))  # noqa: E731
    tangents = [torch.randn(a.shape) for a in inputs]
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(a, t.to(a.dtype)) for a, t in zip(inputs, tangents)]
        tangent = forward_ad.unpack_dual(loss(lambda a: layer.run(a, backend), dual)).tangent
        got = torch.autograd.grad(tangent, inputs)
    gradients = torch.autograd.grad(loss(layer.truth, exact), exact, create_graph=True)
    close(got, torch.autograd.grad(gradients, exact, [t.double() for t in tangents]), "derivatives")


@backends
def test_tangents_that_only_a_backward_pass_meets(modules):
    """Linear in the incoming gradient: what it is given along a tangent is the gradient of that tangent."""
    x, direction, tangent = torch.randn(6, 3, 4), torch.randn(6, 3, 10), torch.randn(6, 3, 10)
    results = []
    for module in modules:
        dtype = next(module.parameters()).dtype
        inputs = [x.to(dtype).requires_grad_(), *module.parameters()]
        output = module(inputs[0])[0]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(direction.to(dtype), tangent.to(dtype))
            gradients = torch.autograd.grad(output, inputs, dual)
            results.append([forward_ad.unpack_dual(gradient).tangent for gradient in gradients])
    close(results[1], results[0], "derivatives")


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


@backends_but_slow
def test_padding_that_is_nan_leaves_no_trace(backend):
    layer = Layer(4, 3, 5, 6, masked=True)
    layer.lengths, layer.reset = torch.tensor([4, 2, 4]), None

    def penalty(fill):
        inputs = layer.to(dtype_of(backend))
        x = inputs[0].detach().clone()
        x[2:, 1] = fill
        inputs[0] = x.requires_grad_()
        outputs = layer.run(inputs, backend)[:3]
        gradients = torch.autograd.grad(sum(a.pow(2).sum() for a in outputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), inputs)

    torch.testing.assert_close(penalty(float("nan")), penalty(0.0))


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


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize(
    "cell", [cells.lstm, cells.gru, cells.layer_norm_lstm, cells.slstm], ids=lambda cell: cell.name
)
@pytest.mark.parametrize("heads", [1, 2])
def test_no_rows(backend, cell, heads):
    """A batch that a filter has emptied has derivatives of every order: zeros of the parameters."""
    rnn = fastlstm.RNN(cell, 3, 4, dtype=torch.double, backend=backend, heads=heads)
    x = torch.randn(5, 0, 3, dtype=torch.double, requires_grad=True)
    inputs = [x, *rnn.parameters()]
    gradients = torch.autograd.grad(rnn(x)[0].pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), inputs)
    output, tangent = jvp(lambda x: rnn(x)[0], (x.detach(),), (x.detach(),))
    assert output.shape == tangent.shape == (5, 0, 4)
    for results in (gradients, second):
        assert all(g.shape == a.shape and not g.any() for g, a in zip(results, inputs))
