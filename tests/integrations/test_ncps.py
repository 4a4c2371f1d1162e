"""The CfC of ncps computes the same with fastlstm."""

import copy

import pytest
import torch
from torch import nn

from fastlstm.integrations import ncps as integration
from fastlstm.integrations import places
from tests.helpers.tolerances import close
from tests.helpers.training import losses_of

NEEDED = "needs the package ncps: pip install .[integrations]"
theirs = pytest.importorskip("ncps.torch", reason=NEEDED)
wirings = pytest.importorskip("ncps.wirings", reason=NEEDED)
B, T, I, H = 4, 9, 5, 20


def cfc(wired=True, **options):
    torch.manual_seed(0)
    units = wirings.AutoNCP(H, 3) if wired else H
    return theirs.CfC(I, units, **({} if wired else {"backbone_layers": 0}), **options).double()


def results(model, x, *given):
    output, states = model(x, *given)
    wanted = [x, *(a for a in (*model.parameters(), *given) if a is not None and a.requires_grad)]
    gradients = torch.autograd.grad(output.square().sum() + states.sin().sum(), wanted)
    return [output, states], gradients


def check(model, x, *given):
    ours = integration.accelerate(copy.deepcopy(model))
    assert list(ours.state_dict()) == list(model.state_dict())
    got, expected = results(ours, x, *given), results(model, x, *given)
    close(got[0], expected[0], "values")
    close(got[1], expected[1], "gradients")


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.fixture
def only_fastlstm(monkeypatch):
    """Copies of a model are made before, and its own cells raise where a copy calls them."""

    def forward(self, *args):
        assert type(self).__module__ != integration.__name__, "the package's own code ran"
        return own(self, *args)

    own = theirs.CfC.forward
    monkeypatch.setattr(theirs.CfC, "forward", forward)
    places._class_for.cache_clear()
    yield
    places._class_for.cache_clear()


@pytest.mark.usefixtures("only_fastlstm")
class TestByFastlstm:
    @pytest.mark.parametrize("mode", integration.KINDS)
    @pytest.mark.parametrize("wired", [True, False], ids=["wired", "not wired"])
    def test_modes(self, wired, mode):
        model = cfc(wired, mode=mode)
        check(model, drawn(B, T, I))
        check(model, drawn(B, T, I), drawn(B, model.state_size))

    @pytest.mark.parametrize(
        "options", [{"batch_first": False}, {"return_sequences": False}, {"proj_size": 2}], ids=str
    )
    def test_options(self, options):
        check(cfc(**options), drawn(*((T, B, I) if "batch_first" in options else (B, T, I))), drawn(B, H))

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_one_sequence(self, batch_first):
        check(cfc(batch_first=batch_first), drawn(T, I), drawn(H), torch.rand(T, 1).double())

    @pytest.mark.parametrize("rows", [1, B])
    def test_times_for_each_unit(self, rows):
        check(cfc(wired=False), drawn(rows, T, I), None, drawn(rows, T, H))

    @pytest.mark.parametrize("shape", [(1, T), (1, T, 1)], ids=str)
    def test_times_for_each_step(self, shape):
        check(cfc(), drawn(1, T, I), None, drawn(*shape))

    def test_training(self):
        torch.manual_seed(1)
        x = torch.randn(16, 12, I).double()
        y = x.cumsum(1)[..., :1].sin()
        curves = []
        for change in (lambda model: model, integration.accelerate):
            model = change(nn.ModuleList([cfc(proj_size=1)]))[0]
            curves.append(losses_of(model, lambda model: (model(x)[0] - y).square().mean(), 1e-2, 20))
        close(curves[1], curves[0], "models")
        assert curves[1][-1] < 0.9 * curves[1][0]


@pytest.mark.parametrize("case", ["a time for each row", "autocast", "one sequence without its outputs"])
def test_what_runs_the_code_of_ncps(case, monkeypatch):
    model, x, times = cfc(wired=case == "autocast"), drawn(B, T, I), None
    if case == "a time for each row":  # as many rows as units, or else the package raises
        x, times = drawn(H, T, I), drawn(H, T)
    elif case != "autocast":
        model, x = cfc(return_sequences=False, batch_first=False), drawn(T, I)
    with torch.autocast("cpu", enabled=case == "autocast"):
        expected = model.float()(x.float(), timespans=None if times is None else times.float())
        monkeypatch.setattr(integration, "run_cell", None)  # which would be called
        got = integration.accelerate(model)(x.float(), timespans=None if times is None else times.float())
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("options", [{"wired": False, "backbone_layers": 1}, {"mixed_memory": True}], ids=str)
def test_what_stays(options):
    torch.manual_seed(0)
    units = wirings.AutoNCP(H, 3) if options.pop("wired", True) else H
    model = theirs.CfC(I, units, **options)
    with pytest.warns(UserWarning, match=r"^CfC stays as it is: it has a backbone or mixed_memory$"):
        integration.accelerate(nn.Sequential(model))
    assert type(model) is theirs.CfC
