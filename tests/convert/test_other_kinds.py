"""Models of GRUs, plain RNNs and cells over to fastlstm and back."""

import re
import types
import warnings
from typing import Generic, TypeVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastlstm
from fastlstm.convert import replace, restore
from tests.helpers.modules import OURS, Double
from tests.helpers.tolerances import close

KINDS = list(OURS.items())
each_kind = pytest.mark.parametrize(("theirs", "ours"), KINDS, ids=[theirs.__name__ for theirs in OURS])


Item = TypeVar("Item")


@pytest.mark.parametrize("bases", [(nn.GRU, Generic[Item]), (Generic[Item], nn.GRU)], ids=["torch first", "last"])
def test_generic_subclasses(bases):
    """Their bases have an order of their own, which has to go together with that of fastlstm's classes."""
    cls = types.new_class("Own", bases)
    module, x = cls(3, 5), torch.randn(4, 2, 3)
    want = module(x)
    close(replace(module)(x), want, "sums")
    assert isinstance(module, fastlstm.GRU)
    assert type(restore(module)) is cls


@each_kind
@pytest.mark.parametrize("keep_type", [False, True])
@pytest.mark.parametrize("parametrized", [False, True])
def test_the_repr_says_whose_module_it_is(theirs, ours, keep_type, parametrized):
    class Own(theirs):
        pass

    class Named(theirs):
        def _get_name(self):
            return "Mine"

    name = "weight_hh" if issubclass(theirs, nn.RNNCellBase) else "weight_hh_l0"
    for make, called in ((theirs, f"fastlstm.{ours.__name__}"), (Own, "Own"), (Named, "Mine")):
        model = nn.ModuleList([make(3, 5)])
        if parametrized:
            parametrize.register_parametrization(model[0], name, Double())
        before = str(model)
        after = str(replace(model, keep_type=keep_type))
        assert (after == before) is (make is not theirs)
        called = f"Parametrized{called}" if parametrized and make is Own else called
        assert f"(0): {called}(" in after
        assert str(restore(model)) == before


class OfItsConstructor(nn.GRU):
    def __init__(self, size):
        super().__init__(size, size, batch_first=True)
        self.size = size


class InAHelper(nn.GRU):
    """Its forward reaches torch's in a function within another method."""

    def forward(self, x):
        return self.doubled(x)

    def doubled(self, x):
        return [2 * a for a in (lambda: super(InAHelper, self).forward(x))()]


class OfAMixin(nn.GRU):
    pass


class Mixin:
    def forward(self, x):
        return super().forward(x)


class Mixed(Mixin, OfAMixin):
    pass


class ByTorch(nn.GRU):
    """Its forward names torch's class, and so runs torch's code whatever class it has."""

    def forward(self, x):
        return nn.GRU.forward(self, x)


class OfItsOwn(nn.GRU):
    def forward(self, x):
        return x @ self.weight_ih_l0.mT, None


class Derived(OfItsOwn):
    pass


def test_subclasses_that_run_ours_and_those_that_stay(recwarn):
    """The second are named once, with the reason."""
    taken = [OfItsConstructor(3), InAHelper(3, 3), Mixed(3, 3)]
    left = [cls(3, 3) for cls in (ByTorch, OfItsOwn, Derived, OfItsOwn)]
    model, x = nn.ModuleList([*taken, *left, nn.GRU(3, 3)]), torch.randn(4, 2, 3)
    wants = [module(x)[0] for module in model]
    assert replace(model) is model
    assert [isinstance(module, fastlstm.GRU) for module in model] == [True] * 3 + [False] * 4 + [True]
    assert [type(module) for module in left] == [ByTorch, OfItsOwn, Derived, OfItsOwn]
    for module, want in zip(model, wants, strict=True):
        close(module(x)[0], want, "sums")
    with fastlstm.patch():
        assert [isinstance(cls(3, 3), fastlstm.GRU) for cls in (InAHelper, Derived)] == [True, False]
    why = "whose forward does not call super().forward; it stays torch's"
    names = ["ByTorch", "OfItsOwn", "Derived"]
    messages = [f"replace cannot replace a {name} {why}" for name in names]
    assert [str(each.message) for each in recwarn] == [*messages, f"patch cannot replace a Derived {why}"]
    assert {each.filename for each in recwarn} == {__file__}


def test_a_model_of_nothing_recurrent_is_warned_of():
    found = (
        "replace found no torch.nn.LSTM, torch.nn.LSTMCell, torch.nn.GRU, torch.nn.RNN, torch.nn.GRUCell or "
        "torch.nn.RNNCell in the Linear"
    )
    with pytest.warns(UserWarning, match=re.escape(found)) as caught:
        replace(nn.Linear(3, 5))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(replace(nn.Sequential(nn.GRU(3, 5))))


def test_what_has_no_counterpart_in_torch_stays():
    rnn = fastlstm.RNN(fastlstm.cells.slstm, 3, 5)
    with pytest.warns(UserWarning, match="an RNN of any cell has no counterpart in torch and stays"):
        restore(rnn)
    assert type(rnn) is fastlstm.RNN
    gru = fastlstm.GRU(3, 5, zoneout=0.1)
    with pytest.warns(UserWarning, match=r"the GRU forgets recurrent_dropout=0.0 and zoneout=0.1") as caught:
        restore(gru)
    assert type(gru) is nn.GRU
    assert caught[0].filename == __file__
