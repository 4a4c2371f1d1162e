"""int8 modules under compilers, exports, torch.func's transforms and autograd."""

import io

import pytest
import torch
from torch import nn

import fastlstm
from fastlstm import torch_private
from tests.helpers.modules import flat
from tests.helpers.quantized import Tagger, both_activations, both_kinds, quantized, same_bits


@torch.no_grad()
@both_activations
def test_compiled_and_exported(activations):
    torch.manual_seed(0)
    model, x = Tagger(), torch.randn(5, 3, 4)
    made = fastlstm.quantize(model, activations)
    want = made(x)
    assert same_bits([torch.compile(made, backend="aot_eager", fullgraph=True)(x)], [want])
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
@pytest.mark.parametrize(
    ("name", "a"), [("weight_hh_l0", torch.ones(20, 1).char()), ("weight_ih_l0", torch.ones(20, 3).char()),
                    ("weight_hh_l0_scale", torch.ones(4)), ("bias_hh_l0", torch.ones(1))],
)  # fmt: skip
def test_a_program_with_weights_of_another_shape_is_refused(name, a):
    x, made = torch.randn(6, 3, 4), quantized(fastlstm.LSTM(4, 5))
    program = torch.export.export(made, (x,))
    program.state_dict[name] = a
    with pytest.raises(ValueError, match=r"(weight|bias)_.h(_scale)? must |an int8 layer must have one head"):
        program.module()(x)


@torch.no_grad()
@both_kinds
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_a_program_with_a_number_that_kernels_cannot_take(kind, name):
    """AVX2 cannot negate -128, which a damaged file may hold."""
    x = torch.randn(6, 3, 4)
    program = torch.export.export(quantized(kind(4, 5)), (x,))
    program.state_dict[name] = program.state_dict[name].clone()
    program.state_dict[name][-1, -1] = -128
    with pytest.raises(ValueError, match=rf"{name[:9]} must have numbers from -127 to 127, got -128"):
        program.module()(x)


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


def test_an_export_to_onnx_raises():
    made = quantized(fastlstm.LSTM(4, 5))
    with pytest.raises(Exception, match="export the float model"):
        torch.onnx.export(made, (torch.randn(3, 2, 4),), io.BytesIO(), dynamo=True, verbose=False)
