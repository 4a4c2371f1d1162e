"""Models that others wrote, unchanged but for `replace`: outputs, gradients and an optimiser's step are the same.

They need their packages: `pip install .[models]`. How each is built stands in benchmarks/cpu/third_party.py.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn

import fastlstm
from benchmarks.cpu.third_party import MODELS
from tests.helpers.tolerances import close

TORCHS = (nn.RNNBase, nn.RNNCellBase)
OURS = (fastlstm.LSTM, fastlstm.GRU, fastlstm.Elman, fastlstm.LSTMCell, fastlstm.GRUCell, fastlstm.ElmanCell)
KINDS = {"SAR": "models that cancel"}  # of tests/helpers/tolerances.py; all others are "models"

pytestmark = pytest.mark.slow


@pytest.fixture(params=MODELS)
def third_party(request):
    chosen = MODELS[request.param]
    pytest.importorskip(chosen.package, reason=f"{request.param} needs {chosen.package}: pip install .[models]")
    if not chosen.float32:
        torch.set_default_dtype(torch.float64)
    yield chosen
    torch.set_default_dtype(torch.float32)


def step(model, run, optimizer):
    """Outputs and gradients of a training step, the same features dropped each time."""
    torch.manual_seed(1)
    outputs = run(model)
    optimizer.zero_grad()
    torch.manual_seed(2)
    torch.autograd.backward(outputs, [torch.randn_like(a) for a in outputs])
    gradients = [p.grad for p in model.parameters()]
    optimizer.step()
    return [a.detach() for a in outputs], gradients


def recurrent(model):
    return [type(m) for m in model.modules() if isinstance(m, (*TORCHS, *OURS))]


def test_equal(third_party, request):
    kind = KINDS.get(request.node.callspec.params["third_party"], "models")
    torch.manual_seed(0)
    theirs, run = third_party.build()
    theirs.train()
    classes, names = recurrent(theirs), list(theirs.state_dict())
    ours = deepcopy(theirs)
    # built before the replacement; with this eps a step is no further off than the gradient
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3) for model in (theirs, ours)]
    fastlstm.replace(ours, keep_type=third_party.keep_type)
    assert classes
    assert all(issubclass(cls, OURS) for cls in recurrent(ours))
    assert list(ours.state_dict()) == names
    for _ in range(2):  # the second step is the first's proof
        expected, got = (step(model, run, optimizer) for model, optimizer in zip((theirs, ours), optimizers))
        close(got, expected, kind)
        close(ours.parameters(), theirs.parameters(), kind)
    assert any(g is not None and g.any() for g in expected[1])
    fastlstm.restore(ours)
    assert recurrent(ours) == classes
    torch.manual_seed(3)
    expected = run(theirs)
    torch.manual_seed(3)
    close([a.detach() for a in run(ours)], [a.detach() for a in expected], kind)


def test_built_under_a_patch(third_party):
    """For libraries that build their network inside `fit`: the same seed draws the same weights."""
    torch.manual_seed(0)
    theirs, run = third_party.build()
    with fastlstm.patch():
        torch.manual_seed(0)
        ours, _ = third_party.build()
    assert [issubclass(cls, OURS) for cls in recurrent(ours)] == [True] * len(recurrent(theirs))
    weights = theirs.state_dict()
    assert list(ours.state_dict()) == list(weights)
    assert [name for name, a in ours.state_dict().items() if not torch.equal(a, weights[name])] == []
    results = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        results.append([a.detach() for a in run(model.train())])
    close(*results, "models")
