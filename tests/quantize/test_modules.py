"""What int8 modules are: plain modules of plain tensors, which take what the float ones take."""

import io
import itertools
import pickle
import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

import fastlstm
from fastlstm.backends import csrc
from tests.helpers.modules import flat
from tests.helpers.numba import run
from tests.helpers.quantized import both_activations, both_kinds, quantized, same_bits

KINDS = [nn.LSTM, nn.GRU, fastlstm.LSTM, fastlstm.GRU]
CELLS = [nn.LSTMCell, nn.GRUCell, fastlstm.LSTMCell, fastlstm.GRUCell]
CLOSE = 2e-2  # of outputs of a few layers of random weights, rounded to int8, and those of the float layers


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *itertools.product(KINDS, ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False})),
        *itertools.product(CELLS, ({}, {"bias": False})),
    ],
)
@both_activations
def test_outputs_are_near_the_float_module_s(kind, activations, options):
    torch.manual_seed(0)
    module, x = kind(7, 9, **options), torch.randn(3, 7) if kind in CELLS else torch.randn(5, 3, 7)
    made = fastlstm.quantize(deepcopy(module), activations)
    state = module(x) if kind in CELLS else module(x)[1]
    alone, of_one = x.select(-2, 0), tree_map(lambda a: a.select(-2, 0), state)
    for inputs in ((x,), (x, state), (alone,), (alone, of_one)):
        for a, b in zip(flat(made(*inputs)), flat(module(*inputs)), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert (a - b).abs().max() < CLOSE


@torch.no_grad()
@both_kinds
def test_lengths_packed_sequences_resets_and_steps(kind):
    torch.manual_seed(0)
    made, x = quantized(kind(7, 9, 2)), torch.randn(6, 4, 7)
    lengths, whole = torch.tensor([6, 0, 3, 5]), flat(made(x))
    output, *last = flat(made(x, lengths=lengths))
    packed = pack_padded_sequence(x[:, [0, 2, 3]], lengths[[0, 2, 3]], enforce_sorted=False)
    unpacked, last_packed = made(packed)
    assert same_bits([pad_packed_sequence(unpacked)[0], *flat(last_packed)], [a[:, [0, 2, 3]] for a in (output, *last)])
    for b, length in enumerate(lengths.tolist()):
        assert same_bits([output[:length, b]], [whole[0][:length, b]])
        assert output[length:, b].eq(0).all()
    reset = torch.zeros(6, 4, dtype=torch.bool)
    reset[2], reset[4, 1] = True, True
    assert same_bits([made(x, reset=reset)[0][2:, [0, 2, 3]]], [made(x[2:])[0][:, [0, 2, 3]]])
    state, outputs = None, []
    for x_t in x:
        h, state = made.step(x_t, state)
        outputs.append(h)
    assert same_bits(flat((torch.stack(outputs), state)), whole)
    with pytest.raises(ValueError, match=r"[Ll]ength"):
        made(x, lengths=[7, 1, 1, 1])


@both_kinds
def test_the_state_dict_is_of_plain_tensors(kind):
    torch.manual_seed(0)
    module = kind(7, 9, bidirectional=True)
    made, x = quantized(module), torch.randn(5, 3, 7)
    gates = 4 if kind is fastlstm.LSTM else 3
    found = {name: (tuple(a.shape), a.dtype) for name, a in made.state_dict().items()}
    for suffix in ("l0", "l0_reverse"):
        for name, columns in (("ih", 7), ("hh", 9)):
            assert found.pop(f"weight_{name}_{suffix}") == ((gates * 9, columns), torch.int8)
            assert found.pop(f"weight_{name}_{suffix}_scale") == ((gates * 9,), torch.float32)
            assert found.pop(f"bias_{name}_{suffix}") == ((gates * 9,), torch.float32)
    assert not found
    assert not list(made.parameters())
    other = quantized(kind(7, 9, bidirectional=True))
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    assert str(other.load_state_dict(torch.load(file))) == "<All keys matched successfully>"
    copies = other, deepcopy(made), pickle.loads(pickle.dumps(made)), pickle.loads(pickle.dumps(deepcopy(other)))
    for each in copies:
        assert same_bits(flat(each(x)), flat(made(x)))
    with pytest.raises(
        RuntimeError, match=r"weight_ih_l0 must have the dtype torch\.int8, got torch\.float32: load a float"
    ):
        made.load_state_dict(module.state_dict(), strict=False)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0_reverse"])
def test_a_state_dict_with_a_number_that_kernels_cannot_take(name):
    model = fastlstm.quantize(nn.Sequential(nn.LSTM(7, 9, bidirectional=True)))
    state, before = deepcopy(model.state_dict()), deepcopy(model.state_dict())
    state[f"0.{name}"][-1, -1] = -128
    with pytest.raises(RuntimeError, match=rf"0\.{name} must have numbers from -127 to 127, got -128"):
        model.load_state_dict(state)
    assert all(torch.equal(a, before[key]) for key, a in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_assigned_to_a_module_on_meta(dtype):
    torch.manual_seed(0)
    made, x = quantized(fastlstm.LSTM(7, 9).to(dtype)), torch.randn(5, 3, 7, dtype=dtype)
    other = quantized(fastlstm.LSTM(7, 9).to(dtype)).to("meta")
    other.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(other(x)[0], made(x)[0])
    weight = other.dequantize().weight_ih_l0
    assert torch.equal(weight, made.dequantize().weight_ih_l0)


TRAINING = """
    import warnings
    import fastlstm
    from torch import nn
    model = fastlstm.quantize(nn.Sequential(nn.LSTM(2, 3), nn.Dropout(), nn.GRUCell(2, 3), nn.Dropout()))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.eval()
        print(len(found), [module.training for module in model])
        assert model.train() is model
        assert model[0].train() is model[0]
        model.train()
    print(len(found), [module.training for module in model])
    print(found[0].category.__name__, found[0].message)
"""


def test_training_mode_warns_once_and_says_what_to_do():
    evaluated, trained, warning = run(TRAINING).splitlines()
    assert evaluated == "0 [False, False, False, False]"
    assert trained == "1 [False, True, False, True]"
    assert warning == (
        "UserWarning a QuantizedLSTM is for inference: it has no parameters and stays in eval mode: train the float "
        "model, which fastlstm.dequantize(model) gives back"
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@both_kinds
def test_other_dtypes(kind, dtype):
    torch.manual_seed(0)
    module, x = kind(7, 9), torch.randn(5, 3, 7)
    made = quantized(module)
    want = flat(made(x.to(dtype).float()))
    scales = {name: a.clone() for name, a in made.state_dict().items()}
    made.to(dtype)
    assert all(torch.equal(a, scales[name]) and a.dtype == scales[name].dtype for name, a in made.state_dict().items())
    assert same_bits([a.float() for a in flat(made(x.to(dtype)))], [a.to(dtype).float() for a in want])
    with pytest.raises(ValueError, match=r"input .*type"):
        made(x)
    assert fastlstm.quantize(kind(7, 9, dtype=dtype)).dequantize().weight_ih_l0.dtype is dtype


@torch.no_grad()
def test_autocast():
    torch.manual_seed(0)
    made, x = quantized(fastlstm.LSTM(7, 9)), torch.randn(5, 3, 7)
    want = made(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = made(x)[0]
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, want.bfloat16())


@torch.no_grad()
def test_no_steps_and_no_rows():
    made = quantized(fastlstm.LSTM(7, 9))
    state = torch.randn(1, 3, 9), torch.randn(1, 3, 9)
    output, last = made(torch.empty(0, 3, 7), state)
    assert output.shape == (0, 3, 9)
    assert same_bits(last, state)
    output, (h_n, c_n) = made(torch.empty(4, 0, 7))
    assert (output.shape, h_n.shape, c_n.shape) == ((4, 0, 9), (1, 0, 9), (1, 0, 9))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize(("arguments", "got"), [((8,), "int"), ((8, 16), "int"), ((nn.RNN(8, 16),), "RNN")])
def test_arguments_of_a_float_module(name, arguments, got):
    message = (
        f"module must be a torch.nn.{name} or a fastlstm.{name}, got {got}: train one, and fastlstm.quantize makes a "
        f"Quantized{name} of it"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        getattr(fastlstm, f"Quantized{name}")(*arguments)


def test_without_the_compiled_library(monkeypatch):
    """`quantize` says what is missing, and the definition still runs by name."""
    made, x = quantized(fastlstm.LSTM(4, 5)), torch.randn(3, 2, 4)
    want = made(x)[0]
    monkeypatch.setattr(csrc, "reason", "the library is not there")
    with pytest.raises(RuntimeError, match=r"int8 layers need .*, and the library is not there\. Install"):
        quantized(fastlstm.LSTM(4, 5))
    with pytest.raises(RuntimeError, match="int8 layers need the compiled library"):
        made(torch.randn(4, 2, 4))
    with fastlstm.use_backend("reference"):
        copy = quantized(made.dequantize())
        for each in (copy, made):
            assert (each(x)[0] - want).abs().max() < 1e-2


def test_backends_without_int8_kernels():
    with pytest.raises(RuntimeError, match="the numba backend has no kernels for int8 weights"):
        fastlstm.quantize(fastlstm.LSTM(4, 5, backend="numba"))
    made = quantized(fastlstm.LSTM(4, 5))
    made.backend = "aten"
    with pytest.raises(RuntimeError, match="the aten backend has no kernels for int8 weights"):
        made(torch.randn(3, 2, 4))


def test_a_mode_that_is_set_draws_no_dropout():
    module, x = fastlstm.quantize(torch.nn.LSTM(3, 4, 2, dropout=0.5)), torch.randn(5, 2, 3)
    module.training = True  # as code does that puts modes back
    with torch.no_grad():
        assert torch.equal(module(x)[0], module(x)[0])


def test_an_exclude_that_names_nothing():
    with pytest.raises(TypeError, match="exclude must be a name, several names or a function, got 3"):
        fastlstm.quantize(torch.nn.LSTM(3, 4), exclude=3)
