"""Modules of torch that are constructed under `fastlstm.patch` are ours."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

import fastlstm
from tests.helpers.modules import OURS
from tests.helpers.threads import at_once

CONSTRUCTORS = {cls: cls.__init__ for cls in OURS}


@pytest.fixture(autouse=True)
def leaves_no_trace():
    yield
    fastlstm.unpatch()
    assert all(cls.__init__ is constructor for cls, constructor in CONSTRUCTORS.items())


class Named(nn.LSTM):
    """A subclass with a constructor of its own, which goes on after torch's."""

    def __init__(self, size):
        super().__init__(size, size, batch_first=True)
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x):
        output, state = super().forward(x)
        return output * self.scale, state


class TakenLater(nn.LSTM):
    """A subclass that sets an attribute which ours needs, after the constructor of torch's class."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.zoneout = 0.5


class Taken(nn.LSTM):
    """A subclass with an attribute that ours needs."""

    backend = "mine"


class Initialised(nn.Module):
    """Every recurrent kind of torch, and a subclass, whose weights start as a library's function says for its class."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([cls(3, 5) for cls in OURS])
        self.named = Named(3)
        self.copies = nn.ModuleList([copy.deepcopy(layer) for layer in self.layers])
        self.apply(self.initialise)

    def initialise(self, module):
        for number, cls in enumerate((nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
            if isinstance(module, cls):
                for name, parameter in module.named_parameters():
                    nn.init.xavier_uniform_(parameter) if "weight" in name else nn.init.constant_(parameter, number)


def test_weights_start_where_they_would_without_it():
    """Libraries ask for the class of a module to choose where its weights start."""
    models = []
    for context in (contextlib.nullcontext, fastlstm.patch):
        with context():
            torch.manual_seed(0)
            models.append(Initialised())
    theirs, ours = models
    assert [isinstance(module, tuple(OURS)) for module in ours.modules()] == [
        isinstance(module, tuple(OURS)) for module in theirs.modules()
    ]
    assert sum(isinstance(module, tuple(OURS.values())) for module in ours.modules()) == 2 * len(OURS) + 1
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("theirs", "ours"), OURS.items(), ids=lambda cls: cls.__name__)
def test_each_class(theirs, ours):
    torch.manual_seed(1)
    before = theirs(3, 5)
    torch.manual_seed(1)
    with fastlstm.patch():
        module = theirs(3, 5)
        named = getattr(nn, theirs.__name__)(3, 5)
    for each in (module, named):
        assert isinstance(each, theirs)
        assert isinstance(each, ours)
        assert type(each).__name__ == theirs.__name__  # by which some libraries choose
    assert type(theirs(3, 5)) is theirs
    for (name, a), (other, b) in zip(module.named_parameters(), before.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    x = torch.randn(4, 3)
    got, want = module(x), before.double()(x.double())
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6)  # values within 1, a few roundings of each


def test_a_network_that_is_built_inside_a_function():
    def fit():
        network = nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 4, 2, bidirectional=True))
        network(torch.randn(5, 2, 2))[0].sum().backward()
        return network

    with fastlstm.patch(backend="reference"):
        network = fit()
    assert isinstance(network[1], fastlstm.LSTM)
    assert network[1].backend == "reference"
    assert type(fit()[1]) is nn.LSTM


def test_a_subclass_keeps_its_own_constructor_and_methods():
    with fastlstm.patch():
        module = Named(3)
    assert isinstance(module, Named)
    assert isinstance(module, fastlstm.LSTM)
    assert dict(module.named_parameters())["scale"].shape == (3,)
    x = torch.randn(2, 4, 3)
    plain = fastlstm.restore(copy.deepcopy(module))
    assert type(plain) is Named
    torch.testing.assert_close(module(x)[0], plain(x)[0], rtol=0, atol=1e-6)  # values within 1
    loaded = pickle.loads(pickle.dumps(module))
    torch.testing.assert_close(loaded(x)[0], module(x)[0], rtol=0, atol=0)


def test_a_subclass_that_cannot_be_ours_stays_and_warns_once(recwarn):
    with fastlstm.patch():
        modules = [Taken(2, 3), Taken(2, 3)]
    assert [type(module) for module in modules] == [Taken, Taken]
    messages = [str(warning.message) for warning in recwarn]
    assert messages == ["patch cannot replace a Taken that has a 'backend' of its own; it stays torch's"]
    assert recwarn[0].filename == __file__


def test_an_attribute_that_the_subclass_sets_itself():
    with fastlstm.patch(), pytest.warns(UserWarning, match="cannot replace a TakenLater that has a 'zoneout'"):
        module = TakenLater(2, 3)
    assert type(module) is TakenLater
    assert module.zoneout == 0.5


def test_a_subclass_that_is_made_meanwhile():
    with fastlstm.patch():

        class New(nn.GRU):
            def __init__(self):
                super().__init__(2, 3)
                self.late = 1

        module = New()
    assert isinstance(module, fastlstm.GRU)
    assert module.late == 1
    assert type(New()) is New
    assert "__init_subclass__" not in vars(nn.GRU)


def test_another_base_still_hears_of_a_subclass():
    heard = []

    class Base:
        def __init_subclass__(cls, name=None, **options):
            super().__init_subclass__(**options)
            heard.append(name)

    with fastlstm.patch():

        class New(nn.LSTM, Base, name="new"):
            pass

        assert isinstance(New(2, 3), fastlstm.LSTM)
    assert heard[0] == "new"


def test_a_wrapper_of_another_library_stays():
    fastlstm.patch()
    inner, calls = nn.LSTM.__init__, []

    def outer(self, *args, **kwargs):
        calls.append(args)
        inner(self, *args, **kwargs)

    nn.LSTM.__init__ = outer
    fastlstm.unpatch()
    assert nn.LSTM.__init__ is outer
    assert type(nn.LSTM(2, 3)) is nn.LSTM
    assert calls == [(2, 3)]
    nn.LSTM.__init__ = CONSTRUCTORS[nn.LSTM]


def test_a_compiler_takes_the_model_whole_after_a_replacement():
    """And refuses it before, as torch's own modules."""
    with fastlstm.patch():
        model, x = nn.Sequential(nn.Linear(2, 3), nn.GRU(3, 4)), torch.randn(5, 2, 2)
    want, compiled = model(x)[0], torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        compiled(x)
    fastlstm.replace(fastlstm.restore(model))
    torch.testing.assert_close(compiled(x)[0], want, rtol=0, atol=0)


def test_patches_nest_and_end():
    def patched():
        """The backend that a layer gets, or "" where it is torch's."""
        module = nn.LSTM(2, 3)
        return module.backend if isinstance(module, fastlstm.LSTM) else ""

    with fastlstm.patch(backend="reference"):
        with fastlstm.patch():
            assert patched() is None  # the latest decides
        assert patched() == "reference"
        fastlstm.unpatch()
        assert patched() == ""
    with pytest.raises(TypeError), fastlstm.patch():
        nn.LSTM()
    assert patched() == ""
    fastlstm.patch()
    assert patched() is None
    for _ in range(2):  # once more than there is to end
        fastlstm.unpatch()
        assert patched() == ""
    with pytest.raises(ValueError, match="backend must be one of"):
        fastlstm.patch(backend="cuda")
    assert patched() == ""


def test_threads_that_patch_and_construct():
    """Every module is one of the two classes, whatever the other threads do, and the last patch ends them all."""
    kinds = set()

    def work():
        for _ in range(50):
            with fastlstm.patch():
                kinds.add(isinstance(nn.LSTMCell(1, 1), fastlstm.LSTMCell))

    at_once(*[work] * 4)
    assert kinds == {True}


def test_modules_of_ours_are_left_alone():
    with fastlstm.patch():
        assert type(fastlstm.LSTM(2, 3)) is fastlstm.LSTM
        assert type(fastlstm.RNN(fastlstm.cells.gru, 2, 3)) is fastlstm.RNN
