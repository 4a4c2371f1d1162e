"""`forget_bias` and `backend` at construction."""

from copy import deepcopy
from typing import Generic, TypeVar, get_args, get_type_hints

import pytest
import torch
from torch import nn

import fastlstm

Item = TypeVar("Item")
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("arguments", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}])
def test_forget_bias(arguments):
    torch.manual_seed(0)
    plain = fastlstm.LSTM(3, 5, **arguments)
    torch.manual_seed(0)
    lstm = fastlstm.LSTM(3, 5, forget_bias=1.5, **arguments)
    for parameters in (lstm, deepcopy(lstm)):
        for (name, a), b in zip(parameters.named_parameters(), plain.parameters(), strict=True):
            if "bias" in name:
                assert torch.equal(a[5:10], torch.full((5,), 1.5 if "bias_ih" in name else 0.0))
                assert torch.equal(torch.cat([a[:5], a[10:]]), torch.cat([b[:5], b[10:]]))
            else:
                assert torch.equal(a, b)
        parameters.reset_parameters()
    assert "forget_bias=1.5" in repr(lstm)
    assert fastlstm.LSTM(3, 5, forget_bias=1, device="meta").bias_ih_l0.device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"forget_bias": "1"}, TypeError, "forget_bias should be a number or None, got: str"),
        ({"forget_bias": True}, TypeError, "forget_bias should be a number or None, got: bool"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "needs bias=True, got forget_bias=1.0 and bias=False"),
    ],
)
def test_bad_keywords(arguments, error, message):
    with pytest.raises(error, match=message):
        fastlstm.LSTM(3, 5, **arguments)


class Zeros(fastlstm.LSTM):
    """Draws its parameters in a way of its own."""

    def reset_parameters(self):
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


def test_a_subclass_that_draws_its_own_parameters_keeps_the_forget_bias():
    assert Zeros(3, 2, forget_bias=1).bias_ih_l0.tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_torch_is_the_first_to_complain():
    with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
        fastlstm.LSTM(3, 0, forget_bias="1")


@pytest.mark.parametrize("module", [fastlstm.LSTM, fastlstm.GRU, fastlstm.Elman])
def test_type_hints_can_be_read(module):
    for method in (module.from_torch, module.to_torch, module.forward, module.step):
        assert "return" in get_type_hints(method)


def test_generic_subclasses():
    class Named(fastlstm.GRU, Generic[Item]):
        pass

    assert get_args(Named[int]) == (int,)
    assert isinstance(Named[int](3, 5), fastlstm.GRU)
