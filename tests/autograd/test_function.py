"""The autograd Functions under torch's transforms, on every fused backend, in float64 where precision is claimed."""

import pytest
import torch
from torch.func import grad, vmap

import fastlstm
from fastlstm import lstm, torch_private
from tests.helpers import interpreter
from tests.helpers.layers import BACKENDS, CPU_BACKENDS, Layer


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


@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradgradcheck(layer, backend):
    inputs = layer.to(torch.double)
    assert torch.autograd.gradgradcheck(
        everything(layer, backend), inputs, check_fwd_over_rev=True, check_rev_over_rev=True
    )


BATCHED = {"x": (0,), "weights": (3, 4, 5, 6), "both": range(7), "states": (1, 2)}  # places among the layer's tensors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("batched", BATCHED)
def test_vmap(backend, batched, axis):
    layer, size = Layer(3, 2, 4, 5), 3
    inputs = layer.to(torch.double, requires_grad=False)
    dims = [None] * 7
    for k in BATCHED[batched]:
        dims[k] = axis
        inputs[k] = (torch.randn(size, *inputs[k].shape, dtype=torch.double) * 0.5).movedim(0, axis)
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


@pytest.mark.parametrize("name", ["x", "weight_ih", "weight_hh", "bias_ih", "h_0", "c_0"])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_an_input_changed_in_place_between_the_passes_is_refused(backend, dtype, T, name):
    module, x = fastlstm.LSTM(5, 6, dtype=dtype, backend=backend), torch.randn(T, 3, 5, dtype=dtype)
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


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 3, 5, requires_grad=True)
        weights = [torch.empty(24, 5), torch.empty(24, 6)]
        output = lstm(x, None, *weights)[0]
        output.sum().backward()
        assert x.grad.shape == x.shape


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
    x, w, u, h = torch.randn(3, 2, 4), torch.randn(20, 4), torch.randn(20, 5), torch.zeros(2, 5)
    w.requires_grad_()
    fastlstm.lstm(x, None, w, u)  # which defines them
    torch.ops.fastlstm.forward(x, w, u, None, None, h, h, None, None, False, True, "numba")[0].sum().backward()
    assert w.grad.shape == w.shape
"""
    interpreter.run(code, check=True)
