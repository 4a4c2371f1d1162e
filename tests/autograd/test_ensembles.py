"""vmap over samples, over stacked models and over both is one kernel call: `test_any_transform.py` has the results."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

import fastlstm
from fastlstm import torch_private
from fastlstm.autograd import operators
from fastlstm.backends import numba
from tests.helpers.layers import Layer
from tests.helpers.transforms import backends


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
