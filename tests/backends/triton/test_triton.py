"""The Triton backend against float64: on the GPU where there is one, in Triton's interpreter on the CPU otherwise."""

import itertools

import pytest
import torch

import fastlstm
from tests.backends.triton.shared import DEVICE
from tests.helpers.layers import Layer, error

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = ("output", "h_n", "c_n", "cells", "x", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
# Outputs and gradients, of the largest value.
BOUNDS = {
    "triton-ieee": (torch.float32, 2e-6, 2e-5),
    # 2^-11 for each factor of a product, over up to 130 terms of both signs, and as much again for tanh.approx's 2^-11
    "triton-tf32": (torch.float32, 3e-3, 3e-3),
    # every input, output and saved gate is rounded to 2^-11, some of them in each of the steps: a few roundings add up
    "triton": (torch.float16, 4e-3, 8e-3),
}


def outputs_and_gradients(layer, name, dtype):
    inputs = [a.to(DEVICE) for a in layer.to(dtype, requires_grad=False)]
    inputs = [a.requires_grad_() for a in inputs]
    if layer.masked:
        layer.lengths, layer.reset = layer.lengths.to(DEVICE), layer.reset.to(DEVICE)
    outputs = layer.run(inputs, name)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(DEVICE, dtype) for g in layer.gradients])]


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


@pytest.mark.sampled(5)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", BOUNDS)
def test_modules_of_two_layers(name, batch_first, bidirectional):
    dtype, forward, backward = BOUNDS[name]
    options = {"batch_first": batch_first, "bidirectional": bidirectional}
    ours = fastlstm.LSTM(6, 20, 2, backend=name, dtype=dtype, device=DEVICE, **options)
    theirs = torch.nn.LSTM(6, 20, 2, dtype=torch.double, **options)
    theirs.load_state_dict({key: value.cpu().double() for key, value in ours.state_dict().items()})
    directions = 2 if bidirectional else 1
    shapes = (9, 4, 6) if batch_first else (4, 9, 6), (2 * directions, 9, 20), (2 * directions, 9, 20)
    given = [torch.randn(shape, dtype=dtype) for shape in shapes]
    results, doutput = [], None
    for module, device in ((ours, DEVICE), (theirs, "cpu")):
        x, *states = (a.to(device, module.weight_ih_l0.dtype).requires_grad_() for a in given)
        output, ends = module(x, tuple(states))
        doutput = torch.randn(output.shape, dtype=dtype) if doutput is None else doutput
        inputs = [x, *states, *module.parameters()]
        gradients = torch.autograd.grad(output, inputs, doutput.to(device, output.dtype))
        results.append([a.detach().cpu() for a in (output, *ends, *gradients)])
    for n, (got, want) in enumerate(zip(*results, strict=True)):
        # the second layer reads what the first has rounded
        assert error(got, want) < 2 * (forward if n < 3 else backward), n


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


@pytest.mark.parametrize("name", BOUNDS)
def test_states_of_any_size_are_taken(name, kernels):
    layer = Layer(3, 4, 5, 17, reverse=True)
    # near fp16's largest number, in one unit a row: several would cancel, and leave the rounding of their sizes
    layer.inputs[1] = torch.zeros(4, 17, dtype=torch.double)
    layer.inputs[1][range(4), [0, 5, 11, 16]] = 3e4
    of_large = layer.inputs[4][:, [0, 5, 11, 16]]  # none so small that its gate has a slope: 3e4 times that overflows
    layer.inputs[4][:, [0, 5, 11, 16]] = of_large.sign() * of_large.abs().clamp(min=0.01)
    # held at first, and in row 0 to the end: h_0 goes on as it is. The last step sees states of ordinary size
    layer.lengths = torch.tensor([0, 2, 2, 2])
    dtype = BOUNDS[name][0]
    forward, backward = (3e-3, 2e-2) if name != "triton-ieee" else (2e-6, 2e-5)
    truth = [a.to(dtype).double().requires_grad_() for a in layer.inputs]
    want = layer.truth(truth)
    want = [*want, *torch.autograd.grad(want, truth, layer.gradients)]
    got = dict(zip(NAMES, outputs_and_gradients(layer, name, dtype), strict=True))
    # 3e4 times what is left of a saturated gate's slope: nothing, or the rounding of 1
    assert got.pop("weight_hh").isfinite().all()
    for n, (label, b) in enumerate(zip(NAMES, want, strict=True)):
        if label in got:
            assert error(got[label].cpu(), b) < (forward if n < 4 else backward), label


def test_empty_batch_and_empty_sequence(kernels):
    weights = [a.to(DEVICE) for a in Layer(1, 1, 3, 9).to(torch.float32)[3:]]
    for T, B in ((3, 0), (0, 3), (0, 0)):
        x, h_0 = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((T, B, 3), (B, 9)))
        output, (h_n, c_n) = fastlstm.lstm(x, (h_0, h_0), *weights, backend="triton")
        assert output.shape == (T, B, 9)
        grads = torch.autograd.grad((output.sum(), h_n.sum(), c_n.sum()), [x, h_0, *weights], allow_unused=T == 0)
        assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["ieee", "tf32", "float16", "bfloat16"])
def test_the_same_bits_again(kind, masked, kernels):
    if kind == "bfloat16" and DEVICE.type == "cpu":
        pytest.skip("the interpreter multiplies the bits of bf16 as integers")
    name, dtype = ("triton", getattr(torch, kind)) if "float" in kind else (f"triton-{kind}", torch.float32)
    layer = Layer(3, 9, 5, 40, masked=masked)
    first, *others = (outputs_and_gradients(layer, name, dtype) for _ in range(2 if DEVICE.type == "cpu" else 20))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_sixteen_bits_carry_the_cell_state_in_float32():
    T, H = 40, 8
    bias = torch.tensor([30.0, 30.0, 0.1, 0.0]).repeat_interleave(H)  # i = f = 1, g = 0.0997
    shapes = (T, 1, 1), (1, H), (4 * H, 1), (4 * H, H)
    x, h_0, w_ih, w_hh, bias = (a.to(DEVICE, torch.float16) for a in (*(torch.zeros(s) for s in shapes), bias))
    c_n = fastlstm.lstm(x, (h_0, h_0 + 512), w_ih, w_hh, bias, backend="triton")[1][1]
    # fp16 is 0.5 apart here, and would never leave 512
    assert (c_n.float() - 512 - T * torch.tanh(bias[2 * H].float())).abs().max() <= 0.25


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.LSTMCell])
def test_backward_within_autocast_stays_in_float32(kind):
    module = kind(4, 20, backend="triton-ieee", device=DEVICE)
    loss = module(torch.randn(*(5,) * (kind is fastlstm.LSTM), 3, 4, device=DEVICE))[0].sin().sum()
    want = torch.autograd.grad(loss, [*module.parameters()], retain_graph=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = torch.autograd.grad(loss, [*module.parameters()])
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)
