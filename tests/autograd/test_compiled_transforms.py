"""Compiled derivatives: torch.func's transforms, forward mode and second derivatives, as eager's."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap

import fastlstm
from fastlstm import torch_private
from tests.helpers.layers import TORCH
from tests.helpers.transforms import backends, dtype_of, needs_triton

pytestmark = pytest.mark.filterwarnings("error:.*lru_cache")  # dynamo warns of a cache on its way


TRANSFORMS = {
    "grad": lambda f: lambda x: grad(lambda x: f(x).pow(2).sum())(x),
    "vmap": lambda f: lambda x: vmap(f, 1, 1)(x.unsqueeze(2)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "jacfwd": lambda f: lambda x: jacfwd(lambda x: f(x).sum(0))(x),
    "hessian": lambda f: lambda x: hessian(lambda x: f(x).pow(2).sum())(x),
    "per sample": lambda f: lambda x: vmap(grad(lambda x: f(x).pow(2).sum()), 1, 1)(x.unsqueeze(2)),
}
# A compiler sees one operator whatever the backend: by default each transform but the hessian is compiled with one.
QUICK = [
    *(("numba", name) for name in ("jvp", "jacfwd", "per sample")),
    ("triton-ieee", "vmap"),
    ("triton-ieee", "grad"),
]


@pytest.mark.parametrize(
    ("backend", "transform"),
    [
        pytest.param(
            backend,
            name,
            marks=[needs_triton] * (backend == "triton-ieee") + [pytest.mark.slow] * ((backend, name) not in QUICK),
        )
        for name in TRANSFORMS
        for backend in ("numba", "reference", "triton-ieee")
    ],
    indirect=["backend"],
)
def test_compiled_transforms(backend, transform):
    dtype = dtype_of(backend)
    lstm, x = fastlstm.LSTM(3, 4, dtype=dtype, backend=backend), torch.randn(4, 2, 3, dtype=dtype)
    torch.set_default_device(None)  # torch cannot compile jacfwd under one
    function = TRANSFORMS[transform](lambda x: lstm(x)[0])
    torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


@pytest.mark.parametrize("freeze", ["parameters", pytest.param("functional", marks=pytest.mark.slow), "no_grad"])
def test_compiled_forward_mode_where_nothing_wants_a_gradient(freeze):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba", dtype=torch.double), torch.randn(5, 2, 3, dtype=torch.double)
    if freeze == "parameters":
        lstm.requires_grad_(False)
    detached = {name: parameter.detach() for name, parameter in lstm.named_parameters()}
    call = (lambda x: functional_call(lstm, detached, (x,))[0]) if freeze == "functional" else lambda x: lstm(x)[0]

    def tangent(x):
        with torch.set_grad_enabled(freeze != "no_grad"):
            return jvp(call, (x,), (torch.ones_like(x),))[1]

    got, want = torch.compile(tangent, backend="aot_eager", fullgraph=True)(x), tangent(x)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(("trained", "lengths"), [(False, None), (False, [5, 2]), (True, None), (True, [0, 4])])
def test_compiled_dual_numbers(trained, lengths, compiler):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba", dtype=torch.double), torch.randn(5, 2, 3, dtype=torch.double)
    lstm.requires_grad_(trained)
    lengths = lengths if lengths is None else torch.tensor(lengths)

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(lstm(forward_ad.make_dual(x, torch.ones_like(x)), lengths=lengths)[0]).tangent

    got, want = torch.compile(tangent, backend=compiler, fullgraph=True)(x), tangent(x)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want)
    assert forward_ad._current_level == -1


@pytest.mark.skipif(TORCH < (2, 13), reason="torch's own Dynamo takes enter_dual_level from 2.13 on")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_level_without_its_context(compiler):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba").requires_grad_(False), torch.randn(5, 2, 3)

    def tangent(x):
        level = forward_ad.enter_dual_level()
        result = forward_ad.unpack_dual(lstm(forward_ad.make_dual(x, torch.ones_like(x)))[0]).tangent
        forward_ad.exit_dual_level(level=level)
        return result

    got, want = torch.compile(tangent, backend=compiler, fullgraph=True)(x), tangent(x)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 0.01


@pytest.mark.parametrize("inside", ["", "disabled", "compiled"])
def test_second_derivatives_around_a_break_of_the_graph(inside):
    """What the backward pass runs then lies in frames that dynamo looks at."""
    lstm, x = fastlstm.LSTM(3, 4, backend="numba"), torch.randn(5, 2, 3, requires_grad=True)
    layer = torch.compiler.disable(lstm) if inside == "disabled" else lstm

    def penalty(x, y=None):
        y = layer(x)[0] if y is None else y
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0].pow(2).sum()

    given = () if inside else (lstm(x)[0],)
    got, want = torch.compile(penalty, backend="eager")(x, *given), penalty(x, *given)
    torch.testing.assert_close(got, want)
    weights = list(lstm.parameters())[:2]
    torch.testing.assert_close(*(torch.autograd.grad(value, weights, retain_graph=True) for value in (got, want)))


@pytest.mark.skipif(
    torch_private.PUBLIC,
    reason="where levels are not known, the reference runs under vmap in a graph, and rounds otherwise",
)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_vmap_where_nothing_wants_a_gradient(compiler):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba").requires_grad_(False), torch.randn(2, 5, 2, 3)
    folded = vmap(lambda x: lstm(x)[0])
    assert torch.equal(torch.compile(folded, backend=compiler, fullgraph=True)(x), folded(x))


@backends
def test_double_backward_of_compiled_code_is_refused(backend):
    """Torch's own limit; what must not happen is an answer."""
    lstm, x = fastlstm.LSTM(3, 4, backend=backend), torch.randn(5, 2, 3, requires_grad=True)
    output = torch.compile(lstm, backend="aot_eager")(x)[0]
    (gradient,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()
