"""What int8 modules are: plain modules of plain tensors, which take what the float ones take."""

import io
import pickle
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
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm import torch_private
from tests.helpers.numba import run
from tests.helpers.quantized import both_activations, both_kinds, flat, quantized, same_bits

KINDS = [nn.LSTM, nn.GRU, fastlstm.LSTM, fastlstm.GRU]
CELLS = [nn.LSTMCell, nn.GRUCell, fastlstm.LSTMCell, fastlstm.GRUCell]
CLOSE = 2e-2  # of outputs of a few layers of random weights, rounded to int8, and those of the float layers


class Tagger(nn.Module):
    """Recurrent modules at several depths, one of them under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.encoder = nn.Sequential(nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True))
        self.decoder = nn.ModuleDict({"rnn": fastlstm.GRU(10, 6, batch_first=True), "cell": nn.LSTMCell(6, 6)})
        self.tied = self.encoder[0]

    def forward(self, x):
        output, _ = self.decoder["rnn"](self.tied(self.embed(x))[0])
        return self.decoder["cell"](output[:, -1])[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@both_activations
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}])
def test_outputs_are_near_the_float_module_s(kind, activations, options):
    torch.manual_seed(0)
    module, x = kind(7, 9, **options), torch.randn(5, 3, 7)
    made = fastlstm.quantize(deepcopy(module), activations)
    hx = flat(module(x))[1:]
    hx = tuple(hx) if len(hx) == 2 else hx[0]
    for inputs in ((x,), (x, hx), (x[:, 0],)):
        for a, b in zip(flat(made(*inputs)), flat(module(*inputs)), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert (a - b).abs().max() < CLOSE


@torch.no_grad()
@pytest.mark.parametrize("kind", CELLS)
@both_activations
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind, activations, bias):
    torch.manual_seed(0)
    cell, x = kind(7, 9, bias), torch.randn(3, 7)
    made = fastlstm.quantize(deepcopy(cell), activations)
    state = cell(x)
    one = tuple(a[0] for a in state) if isinstance(state, tuple) else state[0]
    for inputs in ((x,), (x, state), (x[0],), (x[0], one)):
        got, want = made(*inputs), cell(*inputs)
        pairs = zip(got, want, strict=True) if isinstance(state, tuple) else [(got, want)]
        for a, b in pairs:
            assert a.shape == b.shape
            assert (a - b).abs().max() < CLOSE


@torch.no_grad()
@both_kinds
def test_lengths_packed_sequences_resets_and_steps(kind):
    torch.manual_seed(0)
    made, x = quantized(kind(7, 9, 2)), torch.randn(6, 4, 7)
    lengths, whole = torch.tensor([6, 0, 3, 5]), flat(made(x))
    output, *last = flat(made(x, lengths=lengths))
    packed = pack_padded_sequence(x[:, [0, 2, 3]], lengths[[0, 2, 3]], enforce_sorted=False)
    unpacked, *last_packed = flat(made(packed))
    assert same_bits([pad_packed_sequence(unpacked)[0], *last_packed], [a[:, [0, 2, 3]] for a in (output, *last)])
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


@torch.no_grad()
@both_activations
def test_compiled_and_exported(activations):
    torch.manual_seed(0)
    model, x = Tagger(), torch.randn(5, 3, 4)
    made = fastlstm.quantize(model, activations)
    want = made(x)
    torch._dynamo.reset()
    assert same_bits([torch.compile(made, fullgraph=True)(x)], [want])
    program = torch.export.export(made, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"fastlstm.quantized_lstm.default", "fastlstm.quantized_gru.default"} <= targets
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert same_bits([torch.export.load(file).module()(x)], [want])
    with torch.inference_mode():
        assert same_bits([made(x)], [want])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks of sizes
def test_an_export_of_open_sizes_and_a_trace():
    torch.manual_seed(0)
    made, x, other = quantized(fastlstm.LSTM(4, 5, 2)), torch.randn(6, 3, 4), torch.randn(9, 7, 4)
    sizes = {"input": {0: torch.export.Dim("T", max=1000), 1: torch.export.Dim("B", max=1000)}}
    program = torch.export.export(made, (x,), dynamic_shapes=sizes)
    trace = torch.jit.trace(lambda x: made(x)[0], (x,))
    assert same_bits([program.module()(other)[0], trace(other)], [made(other)[0]] * 2)


@torch.no_grad()
def test_compiled_before():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.LSTM(4, 5)), torch.randn(6, 3, 4)
    want = quantized(model)
    model[0].compile(backend="eager")
    model(x)
    fastlstm.quantize(model)
    assert same_bits(flat(model(x)), flat(want(x)))
    model[0].compile(backend="eager")
    model(x)
    fastlstm.dequantize(model)
    assert same_bits(flat(model(x)), flat(fastlstm.dequantize(want)(x)))
    whole = torch.compile(model, backend="eager")
    whole(x)
    assert same_bits(flat(fastlstm.quantize(whole)(x)), flat(fastlstm.quantize(want)(x)))


@pytest.mark.parametrize("name", ["the module", "1"])
def test_wrapped_by_compile(name):
    def wrap(module):
        module = torch.compile(module)
        return module if name == "the module" else nn.Sequential(fastlstm.quantize(nn.GRU(2, 3)), module, nn.GRU(2, 3))

    message = f"replace a module that torch.compile has wrapped, got {name}: compile after"
    model = wrap(nn.LSTM(2, 3))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match=f"quantize cannot {message} quantize"):
        fastlstm.quantize(model)
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(TypeError, match=f"dequantize cannot {message} dequantize"):
        fastlstm.dequantize(wrap(fastlstm.quantize(nn.LSTM(2, 3))))


@torch.no_grad()
@pytest.mark.skipif(not torch_private.KNOWS_LEVELS, reason="where levels are not known, one may be of grad")
def test_vmap_runs_each_row():
    torch.manual_seed(0)
    made, x = quantized(fastlstm.LSTM(4, 5)), torch.randn(3, 6, 2, 4)
    got = torch.func.vmap(lambda x: made(x)[0])(x)
    assert same_bits([got], [torch.stack([made(each)[0] for each in x])])


def test_derivatives_raise_and_say_what_to_do():
    made, x = quantized(fastlstm.LSTM(4, 5)), torch.randn(6, 2, 4, requires_grad=True)
    output = made(x)[0]
    with pytest.raises(RuntimeError, match=r"int8 weights .* have no gradient: train .*dequantize.*no_grad"):
        output.sum().backward()
    with torch.no_grad():
        assert not made(x)[0].requires_grad
    assert not made(x.detach())[0].requires_grad
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.func.jvp(lambda x: made(x)[0], (x.detach(),), (x.detach(),))
    with pytest.raises(RuntimeError, match="no gradient"):
        torch.func.grad(lambda x: made(x)[0].sum())(x.detach())


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
        "UserWarning a QuantizedLSTM is for inference and stays in eval mode: train the float model, which "
        "fastlstm.dequantize(model) gives back"
    )


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
    assert repr(made) == "QuantizedLSTM(4, 5, batch_first=True, backend=reference, activations=int16)"
    made(torch.zeros(2, 3, 4))
    assert len(seen) == 1
    assert repr(made.dequantize()) == "LSTM(4, 5, batch_first=True, backend=reference)"


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
    with pytest.raises(ValueError, match="dtype"):
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


@torch.no_grad()
def test_parametrized_weights_are_rounded_as_in_eval_mode():
    torch.manual_seed(0)
    module, x = fastlstm.LSTM(7, 9), torch.randn(5, 3, 7)
    want = quantized(module)(x)[0]
    parametrize.register_parametrization(module, "weight_hh_l0", fastlstm.WeightDrop(0.5))
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
    drop = fastlstm.WeightDrop(0.5)
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


@torch.no_grad()
def test_backends():
    made, x = quantized(fastlstm.LSTM(4, 5)), torch.randn(3, 2, 4)
    want = made(x)[0]
    made.backend = "aten"
    with pytest.raises(RuntimeError, match="the aten backend has no kernels for int8 weights"):
        made(x)
    made.backend = None
    with fastlstm.use_backend("reference"):
        assert (made(x)[0] - want).abs().max() < 1e-2


def test_an_export_to_onnx_raises():
    made = quantized(fastlstm.LSTM(4, 5))
    with pytest.raises(Exception, match="export the float model"):
        torch.onnx.export(made, (torch.randn(3, 2, 4),), io.BytesIO(), dynamo=True, verbose=False)
