"""What `quantize` and `dequantize` replace in a model, what of a module stays, and what they refuse."""

import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import (
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

import fastlstm
from tests.helpers.quantized import Tagger, quantized, same_bits

CLOSE = 2e-2  # of outputs of a few layers of random weights, rounded to int8, and those of the float layers


def test_what_is_replaced():
    torch.manual_seed(0)
    model = Tagger()
    before = model.decoder["rnn"]
    assert fastlstm.quantize(model, exclude=("decoder.rnn",)) is model
    assert type(model.tied) is fastlstm.QuantizedLSTM
    assert model.tied is model.encoder[0]
    assert model.decoder["rnn"] is before
    assert type(model.decoder["cell"]) is fastlstm.QuantizedLSTMCell
    fastlstm.quantize(model, exclude=lambda name, module: name != "decoder.rnn")
    assert type(model.decoder["rnn"]) is fastlstm.QuantizedGRU
    model = fastlstm.quantize(Tagger(), exclude=["decoder"])
    assert type(model.tied) is fastlstm.QuantizedLSTM
    assert isinstance(model.decoder["rnn"], fastlstm.GRU)
    assert isinstance(model.decoder["cell"], nn.LSTMCell)
    assert type(fastlstm.quantize(nn.GRUCell(2, 3))) is fastlstm.QuantizedGRUCell


def test_hooks_backend_and_repr_stay():
    module, seen = fastlstm.LSTM(4, 5, batch_first=True, backend="reference"), []
    module.register_forward_hook(lambda *args: seen.append(args))
    made = fastlstm.quantize(module, "int16")
    assert repr(made) == "fastlstm.QuantizedLSTM(4, 5, batch_first=True, backend=reference, activations=int16)"
    made(torch.zeros(2, 3, 4))
    assert len(seen) == 1
    assert repr(made.dequantize()) == "fastlstm.LSTM(4, 5, batch_first=True, backend=reference)"


@torch.no_grad()
def test_dequantize():
    torch.manual_seed(0)
    model, x = Tagger(), torch.randn(5, 3, 4)
    weights, want = deepcopy(model.state_dict()), model(x)
    assert fastlstm.dequantize(fastlstm.quantize(model)) is model
    assert {type(module) for module in model.modules()} >= {fastlstm.LSTM, fastlstm.GRU, fastlstm.LSTMCell}
    assert model.tied is model.encoder[0]
    assert model.state_dict().keys() == weights.keys()
    for name, a in model.state_dict().items():
        # half of a step: the largest weight is 1 / sqrt(H) at most
        assert (a - weights[name]).abs().max() <= 0.5001 / 127 * weights[name].abs().max()
    assert (model(x) - want).abs().max() < CLOSE
    model.train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = fastlstm.quantize(deepcopy(model))
    for name, a in fastlstm.dequantize(again).state_dict().items():
        torch.testing.assert_close(a, model.state_dict()[name], rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("parametrized", [False, True])
def test_modules_that_kept_their_type(kind, parametrized):
    model, x = nn.ModuleList([kind(7, 9)]), torch.randn(5, 7)
    if parametrized:
        name = "weight_hh_l0" if isinstance(model[0], nn.RNNBase) else "weight_hh"
        parametrize.register_parametrization(model[0], name, nn.Dropout(0.5))
    want = fastlstm.quantize(deepcopy(model))
    fastlstm.replace(model, keep_type=True)
    got = fastlstm.quantize(model)
    assert type(got[0]) is type(want[0])
    assert same_bits([got[0](x)[0]], [want[0](x)[0]])
    assert type(fastlstm.dequantize(got)[0]) is getattr(fastlstm, kind.__name__)


@torch.no_grad()
def test_parametrized_weights_are_rounded_as_in_eval_mode():
    torch.manual_seed(0)
    module, x = fastlstm.LSTM(7, 9), torch.randn(5, 3, 7)
    want = quantized(module)(x)[0]
    parametrize.register_parametrization(module, "weight_hh_l0", nn.Dropout(0.5))
    assert same_bits([fastlstm.quantize(module)(x)[0]], [want])


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTM, fastlstm.GRU, nn.LSTMCell])
def test_a_plain_tensor_in_a_weight_s_place(kind):
    torch.manual_seed(0)
    module, x = kind(7, 9), torch.randn(5, 7)
    want, name = quantized(module)(x), "weight_hh" if kind is nn.LSTMCell else "weight_hh_l0"
    weight = getattr(module, name).detach().clone()
    delattr(module, name)
    setattr(module, name, weight)
    made = fastlstm.quantize(module)
    assert same_bits([made(x)[0]], [want[0]])
    assert isinstance(getattr(made.dequantize(), name), nn.Parameter)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("add", "hook", "name", "remove"),
    [
        (lambda *args: prune.l1_unstructured(*args, amount=0.5), "L1Unstructured", "prune.remove", prune.remove),
        (weight_norm, "WeightNorm", "remove_weight_norm", remove_weight_norm),
        (spectral_norm, "SpectralNorm", "remove_spectral_norm", remove_spectral_norm),
    ],
    ids=["prune", "weight_norm", "spectral_norm"],
)
def test_hooks_that_compute_a_weight(add, hook, name, remove):
    model = nn.Sequential(nn.LSTM(7, 9))
    add(model[0], "weight_hh_l0")
    message = f"0 must have no hook that computes a weight, got {hook}: remove it first, with torch.nn.utils.{name}"
    with pytest.raises(ValueError, match=message):
        fastlstm.quantize(model)
    assert type(model[0]) is nn.LSTM
    remove(model[0], "weight_hh_l0")
    assert type(fastlstm.quantize(model)[0]) is fastlstm.QuantizedLSTM


def test_the_float_module_s_modes_stay():
    module = fastlstm.LSTM(7, 9)
    drop = nn.Dropout(0.5)
    parametrize.register_parametrization(module, "weight_hh_l0", drop)
    for training in (True, False):
        module.train(training)
        drop.train(not training)
        fastlstm.quantize(module)
        assert (module.training, drop.training) == (training, not training)


@pytest.mark.parametrize(
    ("add", "name"),
    [
        (lambda module: module.register_buffer("mean", torch.zeros(7)), "mean"),
        (lambda module: module.register_parameter("h_0", nn.Parameter(torch.zeros(9))), "h_0"),
        (lambda module: module.add_module("norm", nn.LayerNorm(9)), "norm"),
    ],
    ids=["buffer", "parameter", "module"],
)
@pytest.mark.parametrize("kind", [nn.LSTM, fastlstm.GRU, nn.GRUCell])
def test_what_users_added_is_not_lost(kind, add, name):
    model = nn.Sequential(kind(7, 9))
    add(model[0])
    message = f"0 must have no parameters, buffers or modules beside its weights, which would be lost, got {name}"
    with pytest.raises(ValueError, match=message):
        fastlstm.quantize(model)
    assert type(model[0]) is kind
    assert hasattr(model[0], name)


class Subclass(nn.LSTM):
    pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "quantize takes a torch.nn.Module, got int"),
        ((nn.LSTM(2, 3), "int4"), ValueError, "activations must be 'int8' or 'int16', got 'int4'"),
        (
            (nn.Sequential(nn.LSTM(2, 3, device="meta")),),
            ValueError,
            "0.weight_ih_l0 must be on a device that holds numbers to round to int8, got the device meta",
        ),
        ((nn.LSTM(2, 3, proj_size=1),), ValueError, "the module must have no projection, got proj_size=1"),
        ((nn.Sequential(fastlstm.GRU(2, 3, zoneout=0.1)),), ValueError, "0 must have no zoneout, got zoneout=0.1"),
        (
            (nn.Sequential(Subclass(2, 3)),),
            TypeError,
            "0 must be no subclass of LSTM unless it is excluded, got Subclass",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fastlstm.quantize(*arguments)


def test_errors_leave_the_model_as_it_was():
    model = Tagger()
    with torch.no_grad():
        model.decoder["cell"].weight_hh[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"decoder\.cell\.weight_hh must be finite to be rounded to int8"):
        fastlstm.quantize(model)
    assert type(model.tied) is nn.LSTM
    with pytest.raises(ValueError, match=r"exclude must have names of modules in the Tagger, got 'decoder\.lstm'"):
        fastlstm.quantize(model, exclude=("decoder.lstm",))


def test_nothing_to_replace():
    with pytest.warns(UserWarning, match="quantize found no LSTM, GRU, LSTMCell or GRUCell to replace in the Linear"):
        fastlstm.quantize(nn.Linear(2, 3))
    with pytest.warns(UserWarning, match="dequantize found no int8 module in the Linear"):
        fastlstm.dequantize(nn.Linear(2, 3))
