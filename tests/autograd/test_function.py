"""The autograd Functions under torch's transforms, on every fused backend, in float64 where precision is claimed."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fastlstm
from fastlstm import lstm, torch_private
from fastlstm.autograd import operators
from fastlstm.backends import reference
from fastlstm.cells import library
from tests.helpers import interpreter
from tests.helpers.layers import BACKENDS, CPU_BACKENDS, Layer, needs_native


@pytest.fixture(params=[(False, False), (True, False), (False, True)], ids=["plain", "reverse", "masked"])
def layer(request):
    reverse, masked = request.param
    return Layer(3, 2, 3, 2, reverse=reverse, masked=masked)


def everything(layer, backend):
    return lambda *inputs: layer.run(list(inputs), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(layer, backend):
    inputs = layer.to(torch.double)
    assert torch.autograd.gradcheck(
        everything(layer, backend),
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradgradcheck(layer, backend):
    inputs = layer.to(torch.double)
    assert torch.autograd.gradgradcheck(
        everything(layer, backend), inputs, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", [jacfwd, jacrev, hessian, lambda f, n: jacfwd(jacfwd(f, n), n)])
def test_functional_jacobians(backend, transform):
    layer = Layer(3, 2, 3, 2)
    inputs = layer.to(torch.double, requires_grad=False)

    def loss(run):
        return lambda *inputs: sum((out**3).sum() for out in run(list(inputs)))

    ours, truth = loss(lambda inputs: layer.run(inputs, backend)), loss(layer.truth)
    for k in (0, 1, 4):
        torch.testing.assert_close(transform(ours, k)(*inputs), transform(truth, k)(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_jvp_of_some_inputs(backend):
    layer = Layer(3, 2, 3, 2)
    inputs = layer.to(torch.double, requires_grad=False)

    def at(run):
        return lambda weight: run([*inputs[:4], weight, *inputs[5:]])

    tangent = (torch.randn_like(inputs[4]),)
    ours = jvp(at(lambda i: layer.run(i, backend)), (inputs[4],), tangent)
    want = jvp(at(layer.truth), (inputs[4],), tangent)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", ["x", "weights", "both", "states", "x, another axis"])
def test_vmap(backend, batched):
    layer, size = Layer(3, 2, 4, 5), 3
    inputs = layer.to(torch.double, requires_grad=False)
    dims = [None] * 7
    for k in {"x": (0,), "weights": (3, 4, 5, 6), "both": range(7), "states": (1, 2), "x, another axis": (0,)}[batched]:
        dims[k] = 0
        inputs[k] = torch.randn(size, *inputs[k].shape, dtype=torch.double) * 0.5
    if batched == "x, another axis":
        inputs[0], dims[0] = inputs[0].movedim(0, 2), 2
    loss = lambda run: lambda *a: sum((out**3).sum() for out in run(list(a)))  # noqa: E731
    ours, truth = lambda *a: layer.run(list(a), backend), lambda *a: layer.truth(list(a))
    torch.testing.assert_close(vmap(ours, tuple(dims))(*inputs), vmap(truth, tuple(dims))(*inputs))
    per_sample = vmap(grad(loss(lambda a: layer.run(a, backend)), tuple(range(7))), tuple(dims))(*inputs)
    torch.testing.assert_close(per_sample, vmap(grad(loss(layer.truth), tuple(range(7))), tuple(dims))(*inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nested_vmap(backend):
    layer = Layer(3, 2, 4, 5)
    x, h_0, c_0, *weights = layer.to(torch.double, requires_grad=False)
    many_x = torch.randn(3, *x.shape, dtype=torch.double)
    many = [torch.stack([w, 2 * w]) for w in weights]

    def nested(run):
        inner = vmap(lambda x, *w: run([x, h_0, c_0, *w])[0], (0, None, None, None, None))
        return vmap(inner, (None, 0, 0, 0, 0))(many_x, *many)

    def nested_stacks(run):
        loss = lambda x, *w: run([x, h_0, c_0, *w])[0].pow(3).sum()  # noqa: E731
        more = [torch.stack([w, 0.5 * w, -w]) for w in many]  # (3, 2, ...)
        return vmap(vmap(grad(loss, (0, 1, 2, 3)), (None, 0, 0, 0, 0)), (0, 0, 0, 0, 0))(many_x, *more)

    torch.testing.assert_close(nested(lambda a: layer.run(a, backend)), nested(layer.truth))
    torch.testing.assert_close(nested_stacks(lambda a: layer.run(a, backend)), nested_stacks(layer.truth))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ensemble_gradients_in_one_call(backend):
    model = fastlstm.LSTM(4, 5, backend=backend).double()
    x = torch.randn(3, 2, 4, dtype=torch.double)
    stacked = {k: torch.stack([v.detach() * s for s in (1.0, 0.5, 2.0)]) for k, v in model.named_parameters()}

    def loss(parameters):
        return functional_call(model, parameters, (x,))[0].pow(2).sum()

    together = vmap(grad(loss))(stacked)
    for m in range(3):
        alone = grad(loss)({k: v[m] for k, v in stacked.items()})
        for k in alone:
            torch.testing.assert_close(together[k][m], alone[k])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    layer = Layer(3, 2, 4, 5, masked=True)
    x, h_0, c_0, w_ih, w_hh, b_ih, b_hh = layer.to(torch.double, requires_grad=False)
    operands = x, w_ih, w_hh, b_ih, b_hh, h_0, c_0, layer.lengths, layer.reset
    torch.library.opcheck(operators.made[library.lstm].forward, (*operands, True, True, backend))
    torch.library.opcheck(operators.made[library.lstm].forward, (*operands, True, False, backend))
    h, _, _, c, gates = operators.made[library.lstm].forward(*operands, True, True, backend)
    grads = list(layer.gradients[:3])
    torch.library.opcheck(
        operators.made[library.lstm].backward,
        (*grads, None, *operands, h, c, gates, True, [True, True, False, True, False, False, True], backend),
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    layer = Layer(4, 3, 5, 6)
    a, b = layer.to(torch.double), layer.to(torch.double)
    run = everything(layer, "numba")
    torch.utils.checkpoint.checkpoint(run, *a, use_reentrant=use_reentrant)[0].sum().backward()
    run(*b)[0].sum().backward()
    for x, y in zip(a, b):
        assert torch.equal(x.grad, y.grad)


def test_saved_tensor_hooks_see_what_is_saved():
    layer, packed = Layer(4, 3, 5, 6), []
    inputs = layer.to(torch.double)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.clone(), lambda t: t):
        output = layer.run(inputs, "numba")[0]
    assert torch.Size((4, 3, 6)) in packed  # h and c
    grads = torch.autograd.grad(output.sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(layer.truth(inputs)[0].sum(), inputs))


def test_backward_twice():
    layer = Layer(4, 3, 5, 6)
    inputs = layer.to(torch.double)
    loss = layer.run(inputs, "numba")[0].sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_an_output_changed_in_place_is_noticed():
    layer = Layer(4, 3, 5, 6)
    inputs = layer.to(torch.double)
    output = lstm(inputs[0], None, *inputs[3:], backend="numba")[0]
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), inputs[0])


@pytest.mark.parametrize("name", ["x", "weight_ih", "weight_hh", "h_0", "c_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_an_input_changed_in_place_between_the_passes_is_refused(backend, dtype, name):
    module, x = fastlstm.LSTM(5, 6, dtype=dtype, backend=backend), torch.randn(4, 3, 5, dtype=dtype)
    state = torch.randn(1, 3, 6, dtype=dtype), torch.randn(1, 3, 6, dtype=dtype)
    x.requires_grad_()
    output, (_, c_n) = module(x, state)
    states, weights = {"h_0": state[0], "c_0": state[1]}, dict(module.named_parameters())
    given = {"x": x, **states, **{name.removesuffix("_l0"): weight for name, weight in weights.items()}}
    with torch.no_grad():
        given[name].mul_(2)
    for result in (output, c_n):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward(retain_graph=True)


def test_meta_and_fake_tensors():
    layer = Layer(4, 3, 5, 6)
    inputs = [a.to("meta") for a in layer.to(torch.float32)]
    output, (h_n, c_n) = lstm(inputs[0], (inputs[1], inputs[2]), *inputs[3:])
    assert (output.shape, h_n.shape, c_n.shape, output.device.type) == ((4, 3, 6), (3, 6), (3, 6), "meta")
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 3, 5, requires_grad=True)
        weights = [torch.empty(24, 5), torch.empty(24, 6)]
        output = lstm(x, None, *weights)[0]
        output.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("numba", None),
        pytest.param("native", True, marks=needs_native),
        pytest.param("numba", True, marks=pytest.mark.slow),
        pytest.param("native", None, marks=[needs_native, pytest.mark.slow]),
        pytest.param("reference", True, marks=pytest.mark.slow),
        pytest.param("reference", None, marks=pytest.mark.slow),
    ],
)
def test_compile_fullgraph(backend, dynamic):
    counter = CompileCounterWithBackend("aot_eager")

    def run(x, *weights):
        return lstm(x, None, *weights, backend=backend)[0]

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    for T, B in ((4, 3), (9, 3), (17, 5), (33, 7)):
        layer = Layer(T, B, 11, 13)  # no two sizes alike, or tracing takes them for one
        inputs = [layer.to(torch.double)[k] for k in (0, 3, 4, 5, 6)]
        got, want = compiled(*inputs), run(*inputs)
        assert torch.equal(got, want)
        gradient = torch.randn_like(got)
        got, want = torch.autograd.grad(got, inputs, gradient), torch.autograd.grad(want, inputs, gradient)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert counter.frame_count <= (1 if dynamic else 3)  # without `dynamic`: as given, then T free, then B
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), run(*inputs))


def test_the_second_derivative_recomputes_from_the_inputs():
    """A gradient penalty, as in WGAN-GP, against the reference's own autograd."""
    layer = Layer(4, 3, 5, 6)

    def penalty(run):
        inputs = layer.to(torch.double)
        (gradient,) = torch.autograd.grad(run(inputs)[0].pow(2).sum(), inputs[0], create_graph=True)
        ((gradient.norm(dim=-1) - 1) ** 2).sum().backward()
        return [a.grad for a in inputs]

    for got, want in zip(penalty(lambda i: layer.run(i, "numba")), penalty(layer.truth)):
        torch.testing.assert_close(got, want)


def test_reference_maths_equals_nn_lstm():
    layer = Layer(5, 3, 4, 6)
    x, h_0, c_0, *weights = layer.to(torch.double)
    module = torch.nn.LSTM(4, 6).double()
    module.load_state_dict(dict(zip(module.state_dict(), weights)))
    want, (h_n, c_n) = module(x, (h_0[None], c_0[None]))
    run = reference.forward(layer.record([x, h_0, c_0, *weights]), False)
    torch.testing.assert_close((run.h, *run.last), (want, h_n[0], c_n[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    """The dtypes of torch's rules for a CPU's autocast, and arithmetic in float32 on the rounded values."""
    x = torch.randn(5, 3, 6)
    for theirs, ours in ((torch.nn.LSTM(6, 7), fastlstm.LSTM), (torch.nn.LSTMCell(6, 7), fastlstm.LSTMCell)):
        mine, whole = ours(6, 7, backend=backend), ours is fastlstm.LSTM
        mine.load_state_dict(theirs.state_dict())
        for dtype in (torch.float32, torch.float64):
            data = (x if whole else x[0]).to(dtype)
            # not under autocast: oneDNN has no bfloat16 LSTM for every processor
            want = theirs.to(dtype)(data)
            with torch.autocast("cpu", torch.bfloat16):
                got = mine.to(dtype)(data)
            rounded = whole and dtype == torch.float32
            assert got[0].dtype == (torch.bfloat16 if rounded else dtype)
            torch.testing.assert_close(got[0].to(dtype), want[0], rtol=0, atol=2e-2 if rounded else 1e-6)
    x.requires_grad_()
    lstm = fastlstm.LSTM(6, 7, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        lstm(x)[0].sum().backward()  # backward inside the context
    rounded = fastlstm.LSTM(6, 7, backend="reference")
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in lstm.state_dict().items()})
    want = torch.autograd.grad(rounded(x.detach().bfloat16().float())[0].sum(), rounded.weight_hh_l0)[0]
    # the gradient goes through bfloat16 once on its way to the parameter
    torch.testing.assert_close(lstm.weight_hh_l0.grad, want, rtol=8e-3, atol=8e-3 * want.abs().max().item())


def test_an_autocast_for_another_device_casts_nothing():
    lstm = fastlstm.LSTM(4, 6)
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    with pytest.raises(ValueError, match="dtype"):
        lstm(torch.randn(3, 2, 4, dtype=torch.double))
    torch.set_autocast_enabled("cuda", before)


@pytest.mark.skipif(torch_private.PUBLIC, reason="torch has no public name for what defines an operator again")
def test_the_operators_can_be_defined_again():
    """As a notebook's autoreload does."""
    code = """
import sys
for _ in range(2):
    for name in [name for name in sys.modules if name.split(".")[0] == "fastlstm"]:
        del sys.modules[name]
    import torch, fastlstm
    from fastlstm import torch_private
    from fastlstm.autograd import operators
    x, w, u, h = torch.randn(3, 2, 4), torch.randn(20, 4), torch.randn(20, 5), torch.zeros(2, 5)
    w.requires_grad_()
    forward = operators.made[fastlstm.cells.lstm].forward
    forward(x, w, u, None, None, h, h, None, None, False, True, "numba")[0].sum().backward()
    assert w.grad.shape == w.shape
"""
    done = interpreter.run(code)
    assert done.returncode == 0, done.stderr
