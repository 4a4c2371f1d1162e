"""The sLSTM cells of xlstm, tirex-ts and tirex-2 give the same with fastlstm."""

import copy
import io
import os

import pytest
import torch
from torch import nn

from fastlstm.integrations import xlstm
from tests.helpers import ROOT, interpreter
from tests.helpers.libraries import check, check_stays, check_their_code, check_training, gradients, library
from tests.helpers.tolerances import close

BF16 = 2**-6  # of the largest value: TiRex's own cell rounds to the 8 bits of bfloat16 at each of a few dozen steps


def cell_of_xlstm(**options):
    theirs = library("xlstm.blocks.slstm.cell", "xlstm")
    start = {"recurrent_weight_init": "standard", "bias_init": "standard"}
    config = theirs.sLSTMCellConfig(**{"hidden_size": 48, "num_heads": 4, "backend": "vanilla", **start, **options})
    torch.manual_seed(0)
    return theirs.sLSTMCell(config, skip_backend_init=True)


def cell_of_tirex(backend="torch"):
    theirs = library("tirex.models.slstm.cell", "tirex-ts")
    torch.manual_seed(0)
    return drawn(theirs.sLSTMCell(theirs.sLSTMBlockConfig(embedding_dim=48, num_heads=4), backend))


def drawn(module, scale=0.3):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=scale)
    return module


def states():
    """States of rows that have seen a few steps: n is positive."""
    h, c, n, m = torch.randn(4, 3, 48)
    return torch.stack([h, c, n.abs() + 0.5, m])


@pytest.mark.parametrize("state", [None, "zeros", "given"])
@pytest.mark.parametrize("shapes", [{}, {"input_shape": "SBGNH", "output_shape": "SBH"}, {"num_heads": 1}])
def test_a_cell_of_xlstm(shapes, state):
    cell = cell_of_xlstm(**shapes)
    x = (3 * torch.randn(*((25, 3) if shapes.get("input_shape") else (3, 25)), 4 * 48)).requires_grad_()
    state = states() if state == "given" else torch.zeros(4, 3, 48) if state == "zeros" else None

    def results(cell):
        output, last = cell(x, state)
        loss = output.pow(2).sum() + last.sin().sum()
        return [output, last], torch.autograd.grad(loss, [x, *cell.parameters()])

    check(xlstm, cell, results, ("sums", "long"))


@pytest.mark.parametrize("given", [False, True])
def test_a_cell_of_xlstm_in_bfloat16(given):
    """Both round other numbers, so that ours has to be as near to the truth as theirs."""
    cell, state = cell_of_xlstm().bfloat16(), states().bfloat16() if given else None
    x = torch.randn(3, 25, 4 * 48).bfloat16()
    with torch.no_grad():
        theirs = cell(x, state)
        ours = xlstm.accelerate(cell)(x, state)
        truth = type(cell).forward(cell.double(), x.double(), None if state is None else state.double())
    for got, expected, true in zip(ours, theirs, truth):
        assert got.dtype == torch.bfloat16
        assert (got - true).abs().max() <= (expected - true).abs().max()


@pytest.mark.parametrize("given", [False, True])
def test_a_cell_of_tirex(given):
    """In float32, which the loop of tirex-ts computes in if its arguments have that type."""
    cell, x, state = cell_of_tirex(), torch.randn(3, 25, 4 * 48), states() if given else None
    rounded = cell(x, state)
    got = xlstm.accelerate(cell)(x, state)
    bias = cell._bias_.view(4, 4, 12).transpose(0, 1).flatten()
    start = torch.zeros(4, 3, 48) if state is None else state
    output, last = cell._impl_forward_torch(x.transpose(0, 1), start, cell._recurrent_kernel_, bias)
    close(got, [output.unflatten(2, (4, 12)).permute(1, 2, 0, 3), last], "sums")
    for a, b in zip(got, rounded):
        assert a.dtype == b.dtype == torch.float32
        assert 0 < (a - b).abs().max() <= BF16 * b.abs().max()


def test_a_model_of_xlstm_learns_the_same():
    theirs = library("xlstm")
    options = {"backend": "vanilla", "recurrent_weight_init": "standard"}
    layer = theirs.sLSTMLayerConfig(num_heads=4, conv1d_kernel_size=4, **options)
    block = theirs.sLSTMBlockConfig(slstm=layer, feedforward=theirs.FeedForwardConfig(proj_factor=1.3))
    torch.manual_seed(0)
    sizes = {"context_length": 32, "num_blocks": 2, "embedding_dim": 32, "slstm_at": "all"}
    model = theirs.xLSTMBlockStack(theirs.xLSTMBlockStackConfig(slstm_block=block, **sizes))
    ours, x = xlstm.accelerate(copy.deepcopy(model)), torch.randn(2, 32, 32)
    assert list(ours.state_dict()) == list(model.state_dict())
    for each in (model, ours):
        each(x).pow(2).sum().backward()
    close(ours(x), model(x), "models")
    close([p.grad for p in ours.parameters()], [p.grad for p in model.parameters()], "models")
    state, expected = {}, {}
    for t in range(3):  # one step after the other
        y, state = ours.step(x[:, t : t + 1], state)
        z, expected = model.step(x[:, t : t + 1], expected)
        close(y, z, "models")


def tirex():
    theirs = library("tirex.models.tirex", "tirex-ts")
    block = {"num_blocks": 2, "embedding_dim": 64, "num_heads": 4}
    config = {"input_patch_size": 16, "output_patch_size": 16, "quantiles": [0.1, 0.5, 0.9], "input_ff_dim": 64}
    torch.manual_seed(0)
    return drawn(theirs.TiRexZero("torch", {**config, "block_kwargs": block}, train_ctx_len=128), 0.1)


def test_a_forecast_of_tirex():
    model, context = tirex(), torch.randn(3, 100).cumsum(1)
    expected, _ = model.forecast(context, prediction_length=40)
    got, _ = xlstm.accelerate(model).forecast(context, prediction_length=40)
    assert 0 < (got - expected).abs().max() <= BF16 * expected.abs().max()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()  # which must not be those of the model that was saved
    assert torch.equal(model.forecast(context, prediction_length=40)[0], got)
    assert not torch.equal(loaded.forecast(context, prediction_length=40)[0], got)
    restored, _ = xlstm.restore(model).forecast(context, prediction_length=40)
    assert torch.equal(restored, expected)


@pytest.mark.parametrize("case", ["autocast", "weights of two dtypes", "rows of which some have seen a step"])
def test_what_runs_the_code_of_xlstm(case, monkeypatch):
    cell, x, state = cell_of_xlstm(), torch.randn(3, 9, 4 * 48), states()
    if case == "weights of two dtypes":  # those that its configuration has by default
        cell, x, state = cell_of_xlstm(enable_automatic_mixed_precision=False), x.bfloat16(), state.bfloat16()
    elif case != "autocast":
        state[:, 1] = 0
    with torch.autocast("cpu", enabled=case == "autocast"):
        check_their_code(xlstm, cell, lambda cell: cell(x, state), monkeypatch)


@pytest.mark.parametrize("make", [lambda: cell_of_xlstm(function="lstm"), lambda: cell_of_tirex("cuda")])
def test_a_cell_that_stays(make):
    check_stays(xlstm, make(), "fastlstm runs those with the function slstm on the backend vanilla or torch$")


CELLS = {"xlstm": cell_of_xlstm, "tirex-ts": cell_of_tirex, "tirex-2": lambda: layer_of_tirex2(torch.float32)}


def inputs_of(package):
    return torch.randn(3, 9, 48 if package == "tirex-2" else 4 * 48)


@pytest.mark.parametrize("package", CELLS)
def test_a_compiler_sees_one_graph(package):
    ours, x = xlstm.accelerate(CELLS[package]()), inputs_of(package)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    close(compiled(x), ours(x), "sums")


def test_an_export_loads_in_a_new_process(tmp_path):
    ours, x = xlstm.accelerate(cell_of_xlstm()), inputs_of("xlstm")
    program = torch.export.export(ours, (x,))
    assert "xlstm_slstm_of_xlstm" in str(program.graph)
    torch.export.save(program, tmp_path / "cell.pt2")
    torch.save((x, ours(x)), tmp_path / "expected.pt")
    code = """if True:
        import torch, fastlstm.integrations.xlstm
        x, expected = torch.load("expected.pt")
        assert all(map(torch.equal, torch.export.load("cell.pt2").module()(x), expected))
    """
    interpreter.run(code, cwd=tmp_path, environment={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def layer_of_tirex2(dtype=torch.float64, **options):
    theirs = library("tirex2.model.component", "tirex-2")
    library("flashrnn", "tirex-2")
    shapes = {"recurrent_shape": "HPGD", "bias_shape": "HGD"}  # as the package's models have them
    config = theirs.FlashRNNLayerConfig(48, num_heads=4, **{"backend": "vanilla", **shapes, **options})
    torch.manual_seed(0)
    return theirs.sLSTMFlashRNNLayer(config, 0, 2).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_of_tirex2(dtype):
    """A norm scales the outputs to one mean square, so a loss of that alone would have no gradient but rounding."""
    layer = layer_of_tirex2(dtype)
    x = torch.randn(3, 25, 48, dtype=dtype).requires_grad_()

    def results(layer):
        output = layer(x)
        return [output], gradients([output], [x, *layer.parameters()])

    check(xlstm, layer, results, ("sums", "long"))


def test_steps_of_a_layer_of_tirex2():
    layer = layer_of_tirex2()
    ours, x = xlstm.accelerate(copy.deepcopy(layer)), torch.randn(3, 4, 48).double()
    state, expected = {"slstm_state": None}, {"slstm_state": None}
    with torch.no_grad():
        for t in range(4):
            y, state = ours.step(x[:, t : t + 1], slstm_state=state["slstm_state"])
            z, expected = layer.step(x[:, t : t + 1], slstm_state=expected["slstm_state"])
            close(y, z, "sums")
            close(state["slstm_state"], expected["slstm_state"], "sums")


def test_a_layer_of_tirex2_learns_the_same():
    layer, (x, y) = layer_of_tirex2(), torch.randn(2, 4, 12, 48).double()
    ours = xlstm.accelerate(copy.deepcopy(layer))
    check_training(layer, ours, lambda layer: (layer(x).flatten(2) - y).square().mean(), 1e-2, 10)


def test_a_layer_of_tirex2_for_a_gpu_stays():
    check_stays(xlstm, layer_of_tirex2(backend="cuda"), "fastlstm runs those with")
