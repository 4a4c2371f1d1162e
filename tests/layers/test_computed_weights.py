"""Weights that hooks or parametrizations compute: what `step` and `stream` read of them."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import fastlstm
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")

LAYERS = [fastlstm.LSTM, fastlstm.GRU, fastlstm.Elman, partial(fastlstm.RNN, fastlstm.cells.peephole_lstm)]
CELLS = [fastlstm.LSTMCell, fastlstm.GRUCell]


def prune_twice(module, name):
    prune.l1_unstructured(module, name, 0.3)
    prune.random_unstructured(module, name, 0.3)


HOOKS = [partial(prune.l1_unstructured, amount=0.5), prune_twice, weight_norm, spectral_norm]
each_hook = pytest.mark.parametrize("hook", HOOKS, ids=["prune", "prune_twice", "weight_norm", "spectral_norm"])


def drop(module, name):
    parametrize.register_parametrization(module, name, nn.Dropout(0.5))


def compute(module, name):
    weight = getattr(module, name)
    delattr(module, name)
    setattr(module, name, 2 * weight)


def weight_of(module):
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"


def hooked(kind, hook):
    """A module after `load_state_dict`, which leaves the tensor that a hook has computed before, and its twin."""
    module, twin = kind(3, 5).double(), kind(3, 5).double()
    for each in (module, twin):
        hook(each, weight_of(each))
    module.load_state_dict(twin.state_dict())
    twin.load_state_dict(twin.state_dict())
    return module, twin


@each_hook
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_a_step_computes_the_weights(kind, hook, training):
    module, twin = (each.train(training) for each in hooked(kind, hook))
    x = torch.randn(2, 3, dtype=torch.double)
    outputs = module.step(x)[0], twin(x.unsqueeze(0))[0].squeeze(0)
    close(*outputs, "values")
    got, want = (torch.autograd.grad(a.sin().sum(), list(m.parameters())) for a, m in zip(outputs, (module, twin)))
    close(got, want, "sums")


def test_a_step_runs_no_other_hook():
    module, seen = fastlstm.LSTM(3, 5), []
    module.register_forward_pre_hook(lambda *args: seen.append("before"))
    module.register_forward_hook(lambda *args: seen.append("after"))
    module.step(torch.randn(2, 3))
    assert seen == []


@each_hook
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_stream_of_hooked_weights(kind, hook):
    module, twin = hooked(kind, hook)
    check_stream(module, twin)


@pytest.mark.parametrize("computed", [drop, parametrizations.weight_norm, parametrizations.orthogonal, compute])
@pytest.mark.parametrize("kind", [LAYERS[0], CELLS[0]])
def test_a_stream_of_other_computed_weights(kind, computed):
    module = kind(3, 5).double()
    computed(module, weight_of(module))
    check_stream(module, module)


def one_step_calls(module, xs):
    """The outputs of calls of one step each."""
    outputs, state = [], None
    for x in xs:
        if isinstance(module, nn.RNNCellBase):
            state = module(x, state)
            outputs.append(state if isinstance(state, torch.Tensor) else state[0])
        else:
            output, state = module(x.unsqueeze(0), state)
            outputs.append(output.squeeze(0))
    return outputs


@torch.no_grad()
def check_stream(module, twin):
    """The steps of a stream equal calls of the twin in eval mode, and the module stays as it is."""
    xs = torch.randn(3, 2, 3, dtype=torch.double).unbind()
    expected = one_step_calls(twin.eval(), xs)
    before, stream = repr(module.train()), module.stream(2)
    assert (repr(module), module.training) == (before, True)
    assert all(a.requires_grad for a in module.parameters())
    for a in (*module.parameters(), *module.buffers(), *vars(module).values()):
        if isinstance(a, torch.Tensor):
            a.zero_()  # which does not reach the stream
    close([stream(x) for x in xs], expected, "values")
    assert not one_step_calls(module.eval(), xs)[0].allclose(expected[0])
    assert "arametrized" not in repr(stream)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_stream_is_no_call_of_the_module(kind, backend):
    """Hooks and functions in the place of `forward` belong to calls. They may hold what cannot be copied."""
    module, lock, seen = kind(3, 5, backend=backend), threading.Lock(), []

    def hook(*args):
        with lock:
            seen.append(args)

    x = torch.randn(2, 3)
    expected = module.stream(2)(x)
    module.register_forward_pre_hook(hook)
    module.register_forward_hook(hook)
    module.note = lock
    module.forward = hook
    everywhere = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert torch.equal(module.stream(2)(x), expected)
    finally:
        everywhere.remove()
    assert seen == []
    module(x)
    assert len(seen) == 3


def test_children_of_a_subclass_are_the_streams_own():
    class Projected(fastlstm.LSTM):
        def __init__(self):
            super().__init__(3, 5)
            self.before = nn.Sequential(weight_norm(nn.Linear(3, 3)), nn.Dropout(0.5))
            lock = threading.Lock()
            self.before.register_forward_hook(lambda module, args, output: 2 * output if lock else output)

        def step(self, x_t, state=None):
            return super().step(self.before(x_t), state)

    module, x = Projected(), torch.randn(2, 3)
    stream = module.stream(2)
    with torch.no_grad():
        expected = module.eval().step(x)[0]
        for a in module.parameters():
            a.zero_()
    close(stream(x), expected, "values")
