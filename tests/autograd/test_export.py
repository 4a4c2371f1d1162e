"""torch.export: open sizes, programs that other processes load, what a program holds."""

import builtins
import functools
import importlib
import sys

import pytest
import torch
from torch.export import Dim
from torch.func import vmap

import fastlstm
from fastlstm import torch_private
from fastlstm.backends import numba
from tests.helpers import interpreter
from tests.helpers.layers import CPU_BACKENDS, needs_native
from tests.helpers.tolerances import close
from tests.helpers.transforms import backends, dtype_of, exporting, needs_triton

pytestmark = pytest.mark.filterwarnings("error:.*lru_cache")  # dynamo warns of a cache on its way


LOADED = """
import sys, torch, fastlstm
folder = sys.argv[1]
program, results = torch.export.load(folder + "/model.pt2").module(), []
for x in torch.load(folder + "/inputs.pt"):
    x.requires_grad_()
    output, (h_n, c_n) = program(x)
    results.append([output.detach(), h_n.detach(), c_n.detach(), *torch.autograd.grad(output.pow(2).sum(), x)])
torch.save(results, folder + "/results.pt")
"""


@pytest.mark.parametrize(
    ("backend", "strict"),
    [
        ("numba", False),
        pytest.param("numba", True, marks=pytest.mark.slow),
        pytest.param("reference", False, marks=pytest.mark.slow),
        pytest.param("triton-ieee", False, marks=[needs_triton, pytest.mark.slow]),
    ],
    indirect=["backend"],
)
def test_export_in_another_process(tmp_path, backend, strict):
    """T and B stay open, and a loaded program trains."""
    dtype = dtype_of(backend)
    lstm = fastlstm.LSTM(11, 13, num_layers=2, bidirectional=True, dtype=dtype, backend=backend)
    open_sizes = {"input": {0: Dim("T", max=100_000), 1: Dim("B", max=100_000)}}
    example = torch.randn(6, 5, 11, dtype=dtype)
    with exporting():
        program = torch.export.export(lstm, (example,), dynamic_shapes=open_sizes, strict=strict)
    assert sum(node.target == torch.ops.fastlstm.forward.default for node in program.graph.nodes) == 4
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = [torch.randn(T, B, 11, dtype=dtype) for T, B in ((1, 1), (1, 3), (5, 1), (4, 7))]
    torch.save(inputs, tmp_path / "inputs.pt")
    interpreter.run(LOADED, tmp_path, check=True)
    for x, got in zip(inputs, torch.load(tmp_path / "results.pt")):
        x.requires_grad_()
        output, states = lstm(x)
        want = [output, *states, *torch.autograd.grad(output.pow(2).sum(), x)]
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
@pytest.mark.parametrize(
    ("name", "shape"), [("hh_l0", (28, 3)), ("hh_l0", (8, 7)), ("ih_l0", (4, 5)), ("ih_l0", (28, 4))]
)
@torch.no_grad()
def test_a_program_with_weights_of_another_shape_is_refused(tmp_path, backend, name, shape):
    """As in a damaged file, of which torch compares no checksums: a kernel would read past the end of the weights."""
    module, x = fastlstm.LSTM(5, 7, backend=backend), torch.randn(3, 2, 5)
    program = torch.export.export(module, (x,))
    torch.export.save(program, tmp_path / "whole.pt2")
    program.state_dict[f"weight_{name}"] = torch.nn.Parameter(torch.zeros(shape))
    torch.export.save(program, tmp_path / "damaged.pt2")
    assert torch.equal(torch.export.load(tmp_path / "whole.pt2").module()(x)[0], module(x)[0])
    damaged = torch.export.load(tmp_path / "damaged.pt2").module()
    with pytest.raises(ValueError, match=r"weight_.h must have shape"):
        damaged(x)


@needs_native
@torch.no_grad()
def test_a_program_with_the_weights_of_heads_is_refused_by_native():
    module, x = fastlstm.LSTM(5, 7, backend="native"), torch.randn(3, 2, 5)
    program = torch.export.export(module, (x,))
    program.state_dict["weight_hh_l0"] = torch.nn.Parameter(torch.zeros(28, 1))
    with pytest.raises(ValueError, match="weight_hh must have the columns of one head for the native backend, got 7"):
        program.module()(x)


DECLARING = """
from fastlstm.cells import cell, sigmoid, tanh

@cell(gates={}, states=("h",))
def own(a, b, h):
    return tanh(a) + sigmoid(b) * h
"""
LOADING = """
import sys, torch, fastlstm, edited_cell
from fastlstm.cells.spec import by_key
for load in (lambda: torch.export.load("model.pt2"), lambda: torch.jit.load("model.pt"), lambda: by_key(sys.argv[1])):
    try:
        load()
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
def test_an_export_does_not_run_an_edited_cell(tmp_path, monkeypatch):
    """Though the file has a cell of the same name and function: what its gates sum has been exchanged."""
    file = tmp_path / "edited_cell.py"
    file.write_text(DECLARING.replace("{}", '{"a": "x", "b": "h"}'))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    cell = importlib.import_module(file.stem).own
    rnn, x = fastlstm.RNN(cell, 3, 3, backend="reference"), torch.ones(2, 1, 3)
    torch.export.save(torch.export.export(rnn, (x,)), tmp_path / "model.pt2")
    torch.jit.save(torch.jit.trace(rnn, (x,)), tmp_path / "model.pt")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x)[0], rnn(x)[0])
    file.write_text(DECLARING.replace("{}", '{"a": "h", "b": "x"}'))
    done = interpreter.run(LOADING, cell.key, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["RuntimeError", "RuntimeError", "LookupError"]
    assert cell.key in done.stderr  # torch's warning names the operator


MASKS = {"reset": torch.rand(5, 4) < 0.3, "lengths": torch.tensor([5, 0, 2, 4])}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "backend", ["numba", pytest.param("triton-ieee", marks=[needs_triton, pytest.mark.slow])], indirect=True
)
def test_a_program_takes_masks(backend, name):
    lstm, x = fastlstm.LSTM(3, 4, 2, backend=backend), torch.randn(5, 4, 3, requires_grad=True)
    mask = {name: MASKS[name]}
    program = torch.export.export(lstm, (x,), mask).module()
    results = [f(x, **mask)[0] for f in (program, lstm)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(r.pow(2).sum(), x)[0] for r in results))


@pytest.mark.parametrize("freeze", [True, False])
def test_an_export_holds_operators_alone(freeze):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba").requires_grad_(not freeze), torch.randn(5, 2, 3)
    program = torch.export.export(lstm, (x,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "fastlstm.forward.default" in names
    assert not [name for name in names if "dual" in name]
    folded = vmap(lambda x: program.module()(x)[0])(torch.stack((x, x + 1)))
    close(folded[1], lstm(x + 1)[0], "values")


def test_gradients_of_an_export_under_vmap():
    """The rules of operators reach weights that no level has wrapped: their gradients are wanted all the same."""

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.lstm = torch.nn.Linear(3, 4), fastlstm.LSTM(4, 4, backend="numba")

        def forward(self, x):
            y = self.linear(x)
            return y + self.lstm(y)[0]

    model, x, results = Residual(), torch.randn(3, 5, 2, 3), []
    program = torch.export.export(model, (x[0],)).module()
    for module, call in ((model, vmap(model)), (program, vmap(program))):
        module.zero_grad()
        call(x).pow(2).sum().backward()
        results.append({name: p.grad.clone() for name, p in module.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)


def test_builtins_that_an_export_has_replaced(monkeypatch):
    own, replaced = max, functools.partial(max)
    with numba._own_builtins():
        monkeypatch.setattr(builtins, "max", replaced)  # by an export that begins meanwhile
    assert builtins.max is replaced
    with numba._own_builtins():
        assert builtins.max is own
    assert builtins.max is replaced


def test_an_export_before_anything_else(tmp_path):
    """Which exchanges built-in functions while numba is imported."""
    code = """
import fastlstm, torch
program = torch.export.export(fastlstm.LSTM(3, 4, backend="numba"), (torch.randn(5, 2, 3),), strict=False)
assert max(1, 2) == 2 and type(max) is type(len)
"""
    interpreter.run(code, cwd=tmp_path, check=True)


@pytest.mark.skipif(torch_private.PUBLIC, reason="a graph that may be in forward mode saves what training needs")
@backends
def test_an_export_without_gradients_says_so(backend):
    lstm, x = fastlstm.LSTM(3, 4, backend=backend), torch.randn(5, 2, 3)
    with torch.no_grad():
        program = torch.export.export(lstm, (x,)).module()
    with torch.no_grad():
        assert torch.equal(program(x)[0], lstm(x)[0])
    with pytest.raises(RuntimeError, match="save=False"):
        program(x)[0].sum().backward()


@pytest.mark.slow
@backends
def test_aot_inductor(backend, tmp_path):
    """Compiled to a shared library; the LSTM in it is still called through Python."""
    lstm = fastlstm.LSTM(11, 13, backend=backend).eval()
    open_sizes = {"input": {0: Dim("T", max=100_000), 1: Dim("B", max=100_000)}}
    with torch.no_grad():
        program = torch.export.export(lstm, (torch.randn(6, 5, 11),), dynamic_shapes=open_sizes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run, x = torch._inductor.aoti_load_package(package), torch.randn(9, 4, 11)
        torch.testing.assert_close(run(x), lstm(x))
