"""vmap over samples, over stacked models and over both: one kernel call for all, equal to a loop."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastlstm
from fastlstm import ops
from fastlstm.backends import reference
from tests.layers import Layer, error
from tests.transforms import backends, dtype_of, needs_triton

# A few hundred terms below 10 each; float32's products are triton-ieee's, of 22 bits
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture
def models(backend):
    return [fastlstm.LSTM(4, 7, dtype=dtype_of(backend), backend=backend) for _ in range(3)]


def near(got, want, times=1):
    torch.testing.assert_close(got, want, rtol=0, atol=times * TOLERANCES[want.dtype])


@backends
def test_stacked_models_equal_a_loop(models):
    dtype = models[0].weight_ih_l0.dtype
    x = torch.randn(5, 2, 4, dtype=dtype)
    parameters, _ = stack_module_state(models)
    run = lambda p, x: functional_call(models[0], p, (x,))[0]  # noqa: E731
    want = torch.stack([m(x)[0] for m in models])
    with torch.no_grad():
        near(vmap(run, (0, None))(parameters, x), want)
    together = vmap(run, (0, None))(parameters, x)
    near(together, want)
    direction = torch.randn_like(want)
    got = torch.autograd.grad(together, list(parameters.values()), direction)
    wanted = torch.autograd.grad(want, [p for m in models for p in m.parameters()], direction)
    for k, stacked in enumerate(got):
        near(stacked, torch.stack(wanted[k::4]), 10)
    many_x = torch.randn(3, 5, 2, 4, dtype=dtype)
    each = torch.stack([m(x)[0] for m, x in zip(models, many_x)])
    near(vmap(run)(parameters, many_x), each)


@backends
def test_tangents_of_stacked_models_equal_a_loop(models):
    x, tangent = torch.randn(2, 5, 2, 4, dtype=models[0].weight_ih_l0.dtype)
    parameters = {k: v.detach() for k, v in stack_module_state(models)[0].items()}
    run = lambda p: jvp(lambda x: functional_call(models[0], p, (x,))[0], (x,), (tangent,))[1]  # noqa: E731
    want = torch.stack([jvp(lambda x, m=m: m(x)[0], (x,), (tangent,))[1] for m in models])
    near(vmap(run)(parameters), want)


@backends
def test_per_sample_gradients_equal_a_loop(models):
    model, x = models[0], torch.randn(5, 6, 4, dtype=models[0].weight_ih_l0.dtype)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, row):
        return functional_call(model, parameters, (row.unsqueeze(1),))[0].pow(3).sum()

    got = vmap(grad(loss), (None, 1))(parameters, x)
    for b in range(6):
        want = torch.autograd.grad(model(x[:, b : b + 1])[0].pow(3).sum(), list(model.parameters()))
        for name, each in zip(parameters, want):
            near(got[name][b], each, 10)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


STACKS = [  # groups, T, B, I, H, reverse, masked
    (2, 3, 1, 1, 1, False, False),
    (3, 7, 7, 7, 7, True, False),
    (8, 4, 16, 28, 128, False, False),
    (5, 6, 9, 100, 33, True, True),
    (3, 60, 2, 5, 17, False, True),
]


@pytest.mark.parametrize(
    ("backend", "threads", "size"),
    [("numba", threads, size) for threads in (1, 2, 5) for size in STACKS]
    + [pytest.param("triton-ieee", 1, size, marks=needs_triton) for size in (STACKS[1], (5, 3, 9, 40, 33, True, True))]
    # H 128 in ieee: a launch a step
    + [pytest.param("triton-ieee", 1, STACKS[2], marks=[needs_triton, pytest.mark.slow])],
    indirect=["backend"],
)
def test_a_stack_in_one_call(backend, threads, size, set_threads):
    set_threads(threads)
    groups, T, B, I, H, reverse, masked = size
    layer = Layer(T, groups * B, I, H, reverse=reverse, masked=masked)
    x, h_0, c_0, *_ = layer.to(torch.double, requires_grad=False)
    exact = (x, *((torch.randn(groups, 4 * H, *s) * H**-0.5).double() for s in ((I,), (H,), ())), h_0, c_0)
    inputs, grads = ([a.to(dtype_of(backend)) for a in tensors] for tensors in (exact, layer.gradients))
    got = ops.forward(*inputs, layer.mask, reverse, True, backend)
    want = reference.forward(*exact, layer.mask, reverse, True)
    tolerance = TOLERANCES[inputs[0].dtype]
    assert max(map(error, got[:4], want[:4])) < tolerance
    quick = ops.forward(*inputs, layer.mask, reverse, False, backend)
    assert all(torch.equal(a, b) for a, b in zip(quick[:3], got[:3]))
    needs = [True] * 6
    gradients = ops.backward(*grads, *inputs, layer.mask, got[0], *got[3:], reverse, needs, backend)
    wanted = reference.backward(*layer.gradients, *exact, layer.mask, want[0], *want[3:], reverse, needs)
    assert max(map(error, gradients, wanted)) < 10 * tolerance


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
