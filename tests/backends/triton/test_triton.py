"""The Triton backend against float64: on the GPU where there is one, in Triton's interpreter on the CPU otherwise."""

import itertools

import pytest
import torch

import fastlstm
from tests.backends.triton.shared import DEVICE
from tests.helpers.layers import Layer, error

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("wanted", [w for n in (1, 2) for w in itertools.combinations(range(4), n)])
def test_any_outputs_have_gradients(wanted, kernels):
    layer = Layer(3, 3, 5, 35)
    truth, inputs = layer.to(torch.double), [a.to(DEVICE).detach().requires_grad_() for a in layer.to(torch.float32)]
    want, got = layer.truth(truth), layer.run(inputs, "triton-ieee")
    grads = [layer.gradients[k] for k in wanted]
    want = torch.autograd.grad([want[k] for k in wanted], truth, grads)
    got = torch.autograd.grad([got[k] for k in wanted], inputs, [g.to(DEVICE, torch.float32) for g in grads])
    assert max(map(error, (a.cpu() for a in got), want)) < 2e-5


def test_nothing_is_saved_without_a_gradient(monkeypatch, kernels):
    from fastlstm.backends.triton import launch

    saved, original = [], launch.Forward.run

    def forward(self, layer):
        run = original(self, layer)
        saved.append(len(run.saved))  # c and gates
        return run

    monkeypatch.setattr(launch.Forward, "run", forward)
    x, h_0, c_0, *weights = (a.to(DEVICE) for a in Layer(3, 2, 4, 5).to(torch.float32))
    with torch.no_grad():
        quiet = fastlstm.lstm(x, (h_0, c_0), *weights, backend="triton-ieee")[0]
    assert torch.equal(quiet, fastlstm.lstm(x, (h_0, c_0), *weights, backend="triton-ieee")[0])
    assert saved == [0, 2]


def test_the_last_state_alone_brings_no_gradient_of_every_step(monkeypatch):
    from fastlstm.backends.triton.backward_pass import Backward

    given, original = [], Backward.run

    def backward(self, grads, *rest):
        (dh_n, dc_n), kept = grads.last, grads.saved
        given.append((grads.h, dh_n is not None, dc_n, any(dc is not None for dc in kept)))
        return original(self, grads, *rest)

    monkeypatch.setattr(Backward, "run", backward)
    x, h_0, c_0, *weights = (a.to(DEVICE) for a in Layer(3, 2, 4, 5).to(torch.float32))
    fastlstm.lstm(x, (h_0, c_0), *weights, backend="triton-ieee")[1][0].sum().backward()
    assert given == [(None, True, None, False)]


@pytest.mark.parametrize("of_sums", [False, True])
def test_strides_are_taken_as_they_are(of_sums, kernels):
    """Those of the gradients of sums are all zero."""
    layer = Layer(4, 3, 6, 35)
    plain = [a.to(DEVICE) for a in layer.to(torch.float32, requires_grad=False)]
    strided = [a.clone() for a in plain]
    strided[0] = strided[0].transpose(0, 1).contiguous().transpose(0, 1)
    for k in (1, 2, 3, 4):
        strided[k] = torch.cat([strided[k], torch.full_like(strided[k], float("nan"))], 1)[:, : strided[k].shape[1]]
    grads = [g.to(DEVICE, torch.float32) for g in layer.gradients]
    turned = [g.transpose(0, -1).contiguous().transpose(0, -1) for g in grads]  # last stride not 1
    turned[0] = grads[0].transpose(0, 1).contiguous().transpose(0, 1)
    grads[2] = turned[2] = grads[2][:1].expand_as(grads[2])  # a sum's gradient
    if of_sums:
        turned = [g.new_tensor(0.3 * k - 0.4).expand_as(g) for k, g in enumerate(grads)]
        grads = [g.contiguous() for g in turned]
    results = []
    for inputs, gradients in ((plain, grads), (strided, turned)):
        inputs = [a.requires_grad_() for a in inputs]
        outputs = layer.run(inputs, "triton-ieee")
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, gradients)])
    for a, b in zip(*results):
        assert error(b.cpu(), a.cpu().double()) < 2e-6  # torch may sum the products with x in another order


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ["triton-ieee", "triton-tf32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "h_0", "c_0"])
def test_nan_and_infinity_travel_as_in_nn_lstm(value, where, name, kernels):
    x, h_0, c_0, *weights = Layer(3, 3, 7, 12).to(torch.float32)
    with torch.no_grad():
        {"x": x[1], "h_0": h_0, "c_0": c_0}[where][1, 3] = value
    module = torch.nn.LSTM(7, 12)
    module.load_state_dict(dict(zip(module.state_dict(), weights)))
    want, (h_n, c_n) = module(x, (h_0[None], c_0[None]))
    x, h_0, c_0, *weights = (a.to(DEVICE) for a in (x, h_0, c_0, *weights))
    got, (h, c) = fastlstm.lstm(x, (h_0, c_0), *weights, backend=name)
    bound = 1e-5 if name == "triton-ieee" else 3e-3
    for a, b in ((got, want), (h, h_n[0]), (c, c_n[0])):
        torch.testing.assert_close(a.cpu(), b, rtol=bound, atol=bound, equal_nan=True)


def test_empty_batch_and_empty_sequence(kernels):
    weights = [a.to(DEVICE) for a in Layer(1, 1, 3, 9).to(torch.float32)[3:]]
    for T, B in ((3, 0), (0, 3), (0, 0)):
        x, h_0 = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((T, B, 3), (B, 9)))
        output, (h_n, c_n) = fastlstm.lstm(x, (h_0, h_0), *weights, backend="triton")
        assert output.shape == (T, B, 9)
        grads = torch.autograd.grad((output.sum(), h_n.sum(), c_n.sum()), [x, h_0, *weights], allow_unused=T == 0)
        assert all(g is None or g.isfinite().all() for g in grads)


def test_sixteen_bits_carry_the_cell_state_in_float32():
    T, H = 40, 8
    bias = torch.tensor([30.0, 30.0, 0.1, 0.0]).repeat_interleave(H)  # i = f = 1, g = 0.0997
    shapes = (T, 1, 1), (1, H), (4 * H, 1), (4 * H, H)
    x, h_0, w_ih, w_hh, bias = (a.to(DEVICE, torch.float16) for a in (*(torch.zeros(s) for s in shapes), bias))
    c_n = fastlstm.lstm(x, (h_0, h_0 + 512), w_ih, w_hh, bias, backend="triton")[1][1]
    # fp16 is 0.5 apart here, and would never leave 512
    assert (c_n.float() - 512 - T * torch.tanh(bias[2 * H].float())).abs().max() <= 0.25
