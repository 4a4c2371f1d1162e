"""Models that others wrote, unchanged but for `replace_lstm`: outputs, gradients and an optimiser's step are the same.

They need their packages: `pip install .[models]`. How each is built stands in benchmarks/cpu/third_party.py.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn

import fastlstm
from benchmarks.cpu.third_party import MODELS
from tests.helpers.tolerances import close

# Values and gradients of size one, or relative to their size, through up to a few hundred steps and the layers around
# them: some thousand roundings.
LSTMS = (nn.LSTM, nn.LSTMCell, fastlstm.LSTM, fastlstm.LSTMCell)

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


def lstms(model):
    return [type(m) for m in model.modules() if isinstance(m, LSTMS)]


def test_equal(third_party):
    torch.manual_seed(0)
    theirs, run = third_party.build()
    theirs.train()
    classes, names = lstms(theirs), list(theirs.state_dict())
    ours = deepcopy(theirs)
    # built before the replacement; with this eps a step is no further off than the gradient
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3) for model in (theirs, ours)]
    fastlstm.replace_lstm(ours, keep_type=third_party.keep_type)
    assert classes
    assert all(issubclass(cls, fastlstm.LSTM | fastlstm.LSTMCell) for cls in lstms(ours))
    assert list(ours.state_dict()) == names
    for _ in range(2):  # the second step is the first's proof
        expected, got = (step(model, run, optimizer) for model, optimizer in zip((theirs, ours), optimizers))
        close(got, expected, "models")
        close(ours.parameters(), theirs.parameters(), "models")
    assert any(g is not None and g.any() for g in expected[1])
    fastlstm.restore_lstm(ours)
    assert lstms(ours) == classes
    torch.manual_seed(3)
    expected = run(theirs)
    torch.manual_seed(3)
    close([a.detach() for a in run(ours)], [a.detach() for a in expected], "models")
