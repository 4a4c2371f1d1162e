"""vmap over samples, over stacked models and over both: one kernel call for all, equal to a loop, in float64."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastlstm
from fastlstm import ops
from fastlstm.backends import reference
from tests.layers import Layer, error

backends = pytest.mark.parametrize("backend", ["numba", "reference"])
TOLERANCE = 1e-12  # float64, a few hundred terms below 10 each


@pytest.fixture(params=["numba", "reference"])
def models(request):
    return [fastlstm.LSTM(4, 7, dtype=torch.double, backend=request.param) for _ in range(3)]


def test_stacked_models_equal_a_loop(models):
    x = torch.randn(5, 2, 4).double()
    parameters, _ = stack_module_state(models)
    run = lambda p, x: functional_call(models[0], p, (x,))[0]  # noqa: E731
    want = torch.stack([m(x)[0] for m in models])
    with torch.no_grad():
        torch.testing.assert_close(vmap(run, (0, None))(parameters, x), want, rtol=0, atol=TOLERANCE)
    together = vmap(run, (0, None))(parameters, x)
    torch.testing.assert_close(together, want, rtol=0, atol=TOLERANCE)
    direction = torch.randn_like(want)
    got = torch.autograd.grad(together, list(parameters.values()), direction)
    wanted = torch.autograd.grad(want, [p for m in models for p in m.parameters()], direction)
    for k, stacked in enumerate(got):
        torch.testing.assert_close(stacked, torch.stack(wanted[k::4]), rtol=0, atol=10 * TOLERANCE)
    many_x = torch.randn(3, 5, 2, 4).double()
    each = torch.stack([m(x)[0] for m, x in zip(models, many_x)])
    torch.testing.assert_close(vmap(run)(parameters, many_x), each, rtol=0, atol=TOLERANCE)


def test_tangents_of_stacked_models_equal_a_loop(models):
    x, tangent = torch.randn(5, 2, 4).double(), torch.randn(5, 2, 4).double()
    parameters = {k: v.detach() for k, v in stack_module_state(models)[0].items()}
    run = lambda p: jvp(lambda x: functional_call(models[0], p, (x,))[0], (x,), (tangent,))[1]  # noqa: E731
    want = torch.stack([jvp(lambda x, m=m: m(x)[0], (x,), (tangent,))[1] for m in models])
    torch.testing.assert_close(vmap(run)(parameters), want, rtol=0, atol=TOLERANCE)


def test_per_sample_gradients_equal_a_loop(models):
    model, x = models[0], torch.randn(5, 6, 4).double()
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, row):
        return functional_call(model, parameters, (row.unsqueeze(1),))[0].pow(3).sum()

    got = vmap(grad(loss), (None, 1))(parameters, x)
    for b in range(6):
        want = torch.autograd.grad(model(x[:, b : b + 1])[0].pow(3).sum(), list(model.parameters()))
        for name, each in zip(parameters, want):
            torch.testing.assert_close(got[name][b], each, rtol=0, atol=10 * TOLERANCE)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("groups", "T", "B", "I", "H", "reverse", "masked"),
    [
        (2, 3, 1, 1, 1, False, False),
        (3, 7, 7, 7, 7, True, False),
        (8, 4, 16, 28, 128, False, False),
        (5, 6, 9, 100, 33, True, True),
        (3, 60, 2, 5, 17, False, True),
    ],
)
def test_a_stack_in_one_call(groups, T, B, I, H, reverse, masked, threads, set_threads):
    set_threads(threads)
    layer = Layer(T, groups * B, I, H, reverse=reverse, masked=masked)
    x, h_0, c_0, *_ = layer.to(torch.double, requires_grad=False)
    scale = H**-0.5
    weights = [torch.randn(groups, 4 * H, *s, dtype=torch.double) * scale for s in ((I,), (H,), ())]
    arguments = (x, *weights, h_0, c_0, layer.mask, reverse)
    got, want = ops.forward(*arguments, True, "numba"), reference.forward(*arguments, True)
    assert max(map(error, got[:4], want[:4])) < TOLERANCE
    quick = ops.forward(*arguments, False, "numba")
    assert all(torch.equal(a, b) for a, b in zip(quick[:3], got[:3]))
    inputs = (x, *weights, h_0, c_0, layer.mask)
    gradients = ops.backward(*layer.gradients, *inputs, got[0], *got[3:], reverse, [True] * 6, "numba")
    wanted = reference.backward(*layer.gradients, *inputs, want[0], *want[3:], reverse, [True] * 6)
    assert max(map(error, gradients, wanted)) < 10 * TOLERANCE


def test_a_stack_in_which_each_group_is_alone():
    """Each group gets the bits that it gets alone on one thread, and a shared weight may be an expanded one."""
    layer = Layer(6, 12, 9, 20)
    x, h_0, c_0, *weights = layer.to(torch.float32, requires_grad=False)
    bias = weights[2] + weights[3]
    shared = [a.unsqueeze(0).expand(3, *a.shape) for a in (weights[0], weights[1], bias)]
    got = ops.forward(x, *shared, h_0, c_0, None, False, True, "numba")
    for g in range(3):
        rows = slice(4 * g, 4 * g + 4)
        alone = ops.forward(x[:, rows], *weights[:2], bias, h_0[rows], c_0[rows], None, False, True, "numba")
        assert torch.equal(got[0][:, rows], alone[0])
        assert torch.equal(got[2][rows], alone[2])


@backends
def test_inference_under_vmap_keeps_nothing(backend, monkeypatch):
    kept, forward = [], ops.forward
    monkeypatch.setattr(ops, "forward", lambda *a: kept.append(a[8]) or forward(*a))
    model, x = fastlstm.LSTM(4, 5, backend=backend), torch.randn(3, 6, 2, 4)
    with torch.no_grad():
        got = vmap(lambda x: model(x)[0])(x)
    assert kept
    assert not any(kept)
    torch.testing.assert_close(got, torch.stack([model(a)[0] for a in x]))
