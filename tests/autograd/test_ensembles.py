"""vmap over samples, over stacked models and over both: one kernel call for all, equal to a loop."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastlstm
from fastlstm import torch_private
from fastlstm.autograd import operators
from fastlstm.backends import numba
from tests.helpers.layers import Layer
from tests.helpers.tolerances import close
from tests.helpers.transforms import backends, backends_but_slow, dtype_of, needs_triton


@pytest.fixture
def models(backend):
    return [fastlstm.LSTM(4, 7, dtype=dtype_of(backend), backend=backend) for _ in range(3)]


@backends
def test_tangents_of_stacked_models_equal_a_loop(models):
    x, tangent = torch.randn(2, 5, 2, 4, dtype=models[0].weight_ih_l0.dtype)
    parameters = {k: v.detach() for k, v in stack_module_state(models)[0].items()}
    run = lambda p: jvp(lambda x: functional_call(models[0], p, (x,))[0], (x,), (tangent,))[1]  # noqa: E731
    want = torch.stack([jvp(lambda x, m=m: m(x)[0], (x,), (tangent,))[1] for m in models])
    close(vmap(run)(parameters), want, "sums")


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
            close(got[name][b], each, "gradients")


STACKS = [  # layers, T, B, I, H, reverse, masked
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
def test_stacks_of_any_size(backend, threads, size, set_threads):
    """Outputs, states and gradients are those of one layer after the other, in plain PyTorch and float64."""
    set_threads(threads)
    stack_size, T, B, I, H, reverse, masked = size
    layers, dtype = [Layer(T, B, I, H, reverse=reverse, masked=masked) for _ in range(stack_size)], dtype_of(backend)
    exact = [layer.to(torch.double) for layer in layers]
    want = [torch.stack(each) for each in zip(*(layer.truth(given) for layer, given in zip(layers, exact)))]
    directions = [torch.stack(each) for each in zip(*(layer.gradients for layer in layers))]
    wanted = torch.autograd.grad(want, [a for given in exact for a in given], directions)
    leaves = [torch.stack(each).to(dtype).detach().requires_grad_() for each in zip(*exact)]
    masks = {name: torch.stack([getattr(each, name) for each in layers]) for name in ("lengths", "reset") if masked}

    def run(x, h_0, c_0, *weights, **masks):
        options = {"reverse": reverse, "return_cells": True, "backend": backend, **masks}
        output, (h_n, c_n), cells = fastlstm.lstm(x, (h_0, c_0), *weights, **options)
        return output, h_n, c_n, cells

    def mapped(*leaves):
        return vmap(lambda leaves, masks: run(*leaves, **masks))(list(leaves), masks)

    got = mapped(*leaves)
    close(got, want, "long")
    gradients = torch.autograd.grad(got, leaves, [a.to(dtype) for a in directions])
    close(gradients, [torch.stack(wanted[k :: len(leaves)]) for k in range(len(leaves))], "derivatives")
    with torch.no_grad():
        assert all(map(torch.equal, mapped(*leaves), got))


def test_a_stack_in_which_each_group_is_alone():
    """Each group gets the bits that it gets alone on one thread, and a shared weight may be an expanded one."""
    layer = Layer(6, 4, 9, 20)
    x, h_0, c_0, *weights = layer.to(torch.float32, requires_grad=False)
    many = [torch.stack([a, 2 * a, -a]) for a in (x, h_0, c_0)]
    shared = [a.unsqueeze(0).expand(3, *a.shape) for a in weights]

    def run(x, h_0, c_0, *weights):
        output, last = fastlstm.lstm(x, (h_0, c_0), *weights, backend="numba")
        return output, *last

    got = vmap(run)(*many, *shared)
    for k in range(3):
        alone = run(*(a[k] for a in many), *weights)
        assert all(torch.equal(a[k], b) for a, b in zip(got, alone))


@pytest.mark.skipif(not torch_private.KNOWS_LEVELS, reason="where levels are not known, one may be of grad")
@backends
def test_inference_under_vmap_keeps_nothing(backend, monkeypatch):
    kept, forward = [], operators.forward
    monkeypatch.setattr(operators, "forward", lambda *a: kept.append(a[-2]) or forward(*a))
    model, x = fastlstm.LSTM(4, 5, backend=backend), torch.randn(3, 6, 2, 4)
    with torch.no_grad():
        got = vmap(lambda x: model(x)[0])(x)
    assert kept
    assert not any(kept)
    torch.testing.assert_close(got, torch.stack([model(a)[0] for a in x]))


@pytest.mark.parametrize("samples_outside", [False, True])
@backends_but_slow
def test_per_sample_gradients_of_stacked_models_equal_a_loop(models, samples_outside):
    """One group a model forward, one a model and sample backward: what the first left is read by the second."""
    stacked = {k: v.detach() for k, v in stack_module_state(models)[0].items()}
    x = torch.randn(3, 4, 4, dtype=models[0].weight_ih_l0.dtype)

    def loss(parameters, row):
        return functional_call(models[0], parameters, (row.unsqueeze(1),))[0].pow(3).sum()

    if samples_outside:
        got = vmap(vmap(grad(loss), (0, None)), (None, 1), out_dims=1)(stacked, x)
    else:
        got = vmap(vmap(grad(loss), (None, 1)), (0, None))(stacked, x)
    for m, model in enumerate(models):
        for b in range(4):
            want = torch.autograd.grad(model(x[:, b : b + 1])[0].pow(3).sum(), list(model.parameters()))
            for name, each in zip(stacked, want):
                close(got[name][m, b], each, "gradients")


@pytest.mark.parametrize("of_x", [False, True])
@backends_but_slow
def test_what_all_models_read_has_the_gradients_of_a_loop(models, of_x):
    """Of the second order, too, by ordinary autograd around `vmap`."""
    x = torch.randn(5, 2, 4, dtype=models[0].weight_ih_l0.dtype, requires_grad=of_x)
    stacked, _ = stack_module_state(models)
    weights = [*stacked.values(), *([x] if of_x else [])]

    def gradients(together):
        first = torch.autograd.grad(together.pow(2).sum(), weights, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), weights)

    got = gradients(vmap(lambda p: functional_call(models[0], p, (x,))[0])(stacked))
    rows = [{k: v[m] for k, v in stacked.items()} for m in range(3)]
    want = gradients(torch.stack([functional_call(models[0], each, (x,))[0] for each in rows]))
    close(got, want, "derivatives")


def test_what_all_models_read_is_not_copied(monkeypatch):
    model, x = fastlstm.LSTM(4, 5), torch.randn(7, 2, 4)
    stacked = {k: torch.stack([v.detach()] * 3) for k, v in model.named_parameters()}
    seen, forward, backward = [], numba.forward, numba.backward
    monkeypatch.setattr(numba, "forward", lambda layer, save: seen.append(layer.x) or forward(layer, save))
    monkeypatch.setattr(numba, "backward", lambda grads, layer, *a: seen.append(layer.x) or backward(grads, layer, *a))
    vmap(grad(lambda p: functional_call(model, p, (x,))[0].sum()))(stacked)
    assert [a.data_ptr() for a in seen] == [x.data_ptr()] * 2
    assert [a.shape for a in seen] == [(7, 3, 2, 4)] * 2


def test_samples_of_one_model_are_rows_of_one_batch(monkeypatch):
    model, x, seen, forward = fastlstm.LSTM(4, 5), torch.randn(3, 7, 2, 4), [], numba.forward
    monkeypatch.setattr(numba, "forward", lambda layer, save: seen.append(layer) or forward(layer, save))
    with torch.no_grad():
        vmap(lambda x: model(x)[0])(x)
    assert [(layer.x.shape, layer.weights[1].shape) for layer in seen] == [((7, 6, 4), (20, 5))]


@backends
def test_models_that_read_the_same_empty_batch(models):
    x = torch.randn(3, 0, 4, dtype=models[0].weight_ih_l0.dtype)
    stacked = {k: v.detach() for k, v in stack_module_state(models)[0].items()}
    loss = lambda p, x: functional_call(models[0], p, (x,))[0].sum()  # noqa: E731
    of_weights, dx = vmap(grad(loss, argnums=(0, 1)), (0, None))(stacked, x)
    assert dx.shape == (3, 3, 0, 4)
    for name, each in of_weights.items():
        assert torch.equal(each, torch.zeros_like(stacked[name]))
