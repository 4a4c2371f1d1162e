"""Layers of torchrecurrent compute the same with fastlstm."""

import copy

import pytest
import torch
from torch import nn

from fastlstm.integrations import torchrecurrent as integration
from tests.helpers.tolerances import close
from tests.helpers.training import losses_of

NEEDED = "needs the package torchrecurrent: pip install .[integrations]"
library = pytest.importorskip("torchrecurrent", reason=NEEDED)
T, B, I, H = 9, 4, 5, 7
kinds = pytest.mark.parametrize("kind", integration.KINDS)


def layer(kind, **options):
    torch.manual_seed(0)
    module = getattr(library, kind)(I, H, **options).double()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def results(module, x, states):
    state = states if len(states) > 1 else states[0] if states else None
    output, last = module(x, state)
    last = last if isinstance(last, tuple) else (last,)
    wanted = [x, *states, *module.parameters()]
    loss = output.square().sum() + sum(a.sin().sum() for a in last)
    return [output, *last], torch.autograd.grad(loss, wanted)


def check(module, x, states=()):
    ours = integration.accelerate(copy.deepcopy(module))
    expected = results(module, x, states)
    own = type(ours).__bases__[0]
    with pytest.MonkeyPatch.context() as patch:
        for cell in module.cells:
            patch.setattr(type(cell), "forward", None)  # which the package's own loop would call
        got = results(ours, x, states)
    assert isinstance(ours, own)
    close(got[0], expected[0], "sums")
    close(got[1], expected[1], "gradients")


def states_of(kind, layers):
    return tuple(drawn(layers, B, H) for _ in integration.KINDS[kind][0].states)


@kinds
def test_one_layer(kind):
    check(layer(kind), drawn(T, B, I))


@kinds
def test_two_layers_with_states(kind):
    check(layer(kind, num_layers=2, batch_first=True), drawn(B, T, I), states_of(kind, 2))


@kinds
def test_without_biases(kind):
    check(layer(kind, bias=False, recurrent_bias=False), drawn(T, B, I))


def test_dropout():
    """Without training it does nothing, and in training it leaves the expected share."""
    module = layer("STAR", num_layers=2, dropout=0.5)
    check(module.eval(), drawn(T, B, I))
    ours, x = integration.accelerate(module.train()), drawn(T, B, I)
    assert not torch.equal(ours(x)[0], ours(x)[0])


@pytest.mark.parametrize("kind", ["LiGRU", "MGU", "PeepholeLSTM"])
def test_other_activations_stay(kind):
    module = layer(kind, nonlinearity="sigmoid")
    message = rf"^{kind} stays as it is: it has other activations than its class by default$"
    with pytest.warns(UserWarning, match=message):
        integration.accelerate(module)
    assert type(module) is getattr(library, kind)


@pytest.mark.parametrize("case", ["autocast", "one sequence", "states of one row"])
def test_what_runs_the_code_of_torchrecurrent(case, monkeypatch):
    module, x, state = layer("STAR").float(), torch.randn(T, B, I), None
    if case == "states of one row":
        state = torch.randn(1, 1, H)

    def call():
        if case != "one sequence":
            return module(x, state)
        with pytest.raises(ValueError, match="not enough values to unpack"):
            module(x[:, 0])
        return ()

    with torch.autocast("cpu", enabled=case == "autocast"):
        expected = call()
        integration.accelerate(module)
        monkeypatch.setattr(integration, "run_cell", None)
        got = call()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_no_random_numbers_are_drawn():
    module = layer("PeepholeLSTM")
    before = torch.random.get_rng_state()
    integration.accelerate(module)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_training():
    torch.manual_seed(1)
    x = torch.randn(12, 16, I).double()
    y = x.cumsum(0)[..., :1].sin()
    curves = []
    for change in (lambda model: model, integration.accelerate):
        torch.manual_seed(0)
        model = change(nn.ModuleList([layer("JANET"), nn.Linear(H, 1).double()]))
        curves.append(losses_of(model, lambda model: (model[1](model[0](x)[0]) - y).square().mean(), 1e-2, 20))
    close(curves[1], curves[0], "models")
    assert curves[1][-1] < 0.9 * curves[1][0]
