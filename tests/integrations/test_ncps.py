"""The CfC of ncps computes the same with fastlstm."""

import copy

import pytest
import torch

from fastlstm.integrations import ncps as integration
from tests.helpers.libraries import check, check_stays, check_their_code, check_training, gradients, library

theirs, wirings = library("ncps.torch", "ncps"), library("ncps.wirings", "ncps")
B, T, I, H = 4, 9, 5, 20


def cfc(wired=True, **options):
    torch.manual_seed(0)
    units = wirings.AutoNCP(H, 3) if wired else H
    return theirs.CfC(I, units, **{**({} if wired else {"backbone_layers": 0}), **options}).double()


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def check_call(model, x, *given):
    def results(model):
        values = model(x, *given)
        wanted = [x, *(a for a in (*model.parameters(), *given) if a is not None and a.requires_grad)]
        return values, gradients(values, wanted)

    ours = check(integration, model, results, refused=[theirs.CfC])
    assert list(ours.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("mode", integration.KINDS)
@pytest.mark.parametrize("wired", [True, False], ids=["wired", "not wired"])
def test_modes(wired, mode):
    model = cfc(wired, mode=mode)
    check_call(model, drawn(B, T, I))
    check_call(model, drawn(B, T, I), drawn(B, model.state_size))


@pytest.mark.parametrize("options", [{"batch_first": False}, {"return_sequences": False}, {"proj_size": 2}], ids=str)
def test_options(options):
    check_call(cfc(**options), drawn(*((T, B, I) if "batch_first" in options else (B, T, I))), drawn(B, H))


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence(batch_first):
    check_call(cfc(batch_first=batch_first), drawn(T, I), drawn(H), torch.rand(T, 1).double())


@pytest.mark.parametrize("rows", [1, B])
def test_times_for_each_unit(rows):
    check_call(cfc(wired=False), drawn(rows, T, I), None, drawn(rows, T, H))


@pytest.mark.parametrize("shape", [(1, T), (1, T, 1)], ids=str)
def test_times_for_each_step(shape):
    check_call(cfc(), drawn(1, T, I), None, drawn(*shape))


def test_training():
    torch.manual_seed(1)
    x, model = torch.randn(16, 12, I).double(), cfc(proj_size=1)
    y, ours = x.cumsum(1)[..., :1].sin(), integration.accelerate(copy.deepcopy(model))
    check_training(model, ours, lambda model: (model(x)[0] - y).square().mean(), 1e-2, 20)


@pytest.mark.parametrize("case", ["a time for each row", "autocast", "one sequence without its outputs"])
def test_what_runs_the_code_of_ncps(case, monkeypatch):
    model, x, times = cfc(wired=case == "autocast"), torch.randn(B, T, I), None
    if case == "a time for each row":  # as many rows as units, or else the package raises
        x, times = torch.randn(H, T, I), torch.randn(H, T)
    elif case != "autocast":
        model, x = cfc(return_sequences=False, batch_first=False), torch.randn(T, I)
    with torch.autocast("cpu", enabled=case == "autocast"):
        check_their_code(integration, model.float(), lambda model: model(x, timespans=times), monkeypatch)


@pytest.mark.parametrize("options", [{"wired": False, "backbone_layers": 1}, {"mixed_memory": True}], ids=str)
def test_what_stays(options):
    check_stays(integration, cfc(**options), "it has a backbone or mixed_memory$")
