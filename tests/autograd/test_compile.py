"""torch.compile and torch.export: one node a layer and direction whatever T, sizes left open, results as eager's."""

import builtins
import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap

import fastlstm
from fastlstm import torch_private
from fastlstm.backends import numba
from tests.helpers import interpreter
from tests.helpers.layers import TORCH
from tests.helpers.tolerances import close
from tests.helpers.transforms import backends, dtype_of, exporting, needs_triton

pytestmark = pytest.mark.filterwarnings("error:.*lru_cache")  # dynamo warns of a cache on its way


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def graph_of(lstm, T):
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    torch.compile(lstm, backend=counter, fullgraph=True, dynamic=False)(torch.randn(T, 2, 3))
    return [(node.op, str(node.target)) for node in counter.graphs[0].graph.nodes]


@backends
def test_the_graph_is_the_same_for_every_length(backend):
    lstm = fastlstm.LSTM(3, 4, num_layers=2, bidirectional=True, backend=backend)
    # Triton's interpreter would take minutes over more
    short, long = (graph_of(lstm, T) for T in ((3, 48) if backend == "triton-ieee" else (16, 1024)))
    assert short == long
    assert sum("_in_graph" in target for _, target in short) == 4


@backends
def test_operators_in_the_traced_graph(backend):
    """What a compiler sees of training: two operators a layer and direction."""
    seen = []

    def collect(graph, example):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph

    lstm = fastlstm.LSTM(3, 4, num_layers=2, bidirectional=True, backend=backend)
    compiled = torch.compile(lstm, backend=aot_autograd(fw_compiler=collect), fullgraph=True)
    compiled(torch.randn(5, 2, 3))[0].sum().backward()
    assert [sum(t == f"fastlstm.{n}.default" for t in g) for g, n in zip(seen, ("forward", "backward"))] == [4, 4]


STACKED = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("numba", {}),
        ("numba", STACKED),
        ("reference", {}),
        pytest.param("triton-ieee", {}, marks=needs_triton),
        pytest.param("triton-ieee", STACKED, marks=[needs_triton, pytest.mark.slow]),
    ],
    indirect=["backend"],
)
def test_no_second_compilation(backend, options):
    """With open sizes, the first call is the only one that compiles."""
    dtype = dtype_of(backend)
    lstm = fastlstm.LSTM(11, 13, dtype=dtype, backend=backend, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, compilations = torch.compile(lstm, backend=counter, fullgraph=True, dynamic=True), []
    for T, B in ((4, 3), (9, 3), (17, 5), (2, 33)):
        x = torch.randn(T, B, 11, dtype=dtype, requires_grad=True)
        got, want = compiled(x), lstm(x)
        compilations.append((counter.frame_count, counters["stats"]["unique_graphs"]))
        assert torch.equal(got[0], want[0])
        assert all(torch.equal(a, b) for a, b in zip(got[1], want[1]))
        direction, of = torch.randn_like(want[0]), [x, *lstm.parameters()]
        gradients = torch.autograd.grad(got[0], of, direction), torch.autograd.grad(want[0], of, direction)
        assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert len(set(compilations)) == 1
    assert compilations[0][1] > 0


@pytest.mark.slow
@backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_equals_eager(backend, dynamic):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = fastlstm.LSTM(7, 33, num_layers=2, backend=backend), torch.nn.Linear(33, 10)

        def forward(self, x):
            return self.head(torch.relu(self.lstm(x)[0]))

    dtype = dtype_of(backend)
    net = Net().to(dtype)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    for T, B in ((6, 5), (9, 3)):
        x = torch.randn(T, B, 7, dtype=dtype, requires_grad=True)
        got, want, of = compiled(x), net(x), [x, *net.parameters()]
        torch.testing.assert_close(got, want)
        direction = torch.randn_like(want)
        torch.testing.assert_close(torch.autograd.grad(got, of, direction), torch.autograd.grad(want, of, direction))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x))


TRANSFORMS = {
    "grad": lambda f: lambda x: grad(lambda x: f(x).pow(2).sum())(x),
    "vmap": lambda f: lambda x: vmap(f, 1, 1)(x.unsqueeze(2)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "jacfwd": lambda f: lambda x: jacfwd(lambda x: f(x).sum(0))(x),
    "hessian": lambda f: lambda x: hessian(lambda x: f(x).pow(2).sum())(x),
    "per sample": lambda f: lambda x: vmap(grad(lambda x: f(x).pow(2).sum()), 1, 1)(x.unsqueeze(2)),
}
# A compiler sees one operator whatever the backend, so that each transform is compiled by default with one of them.
QUICK = {
    *(("numba", name) for name in TRANSFORMS if name != "hessian"),
    ("reference", "jvp"),
    ("triton-ieee", "vmap"),
    ("triton-ieee", "grad"),
}


@pytest.mark.parametrize(
    ("backend", "transform"),
    [
        pytest.param(
            backend,
            name,
            marks=[needs_triton] * (backend == "triton-ieee") + [pytest.mark.slow] * ((backend, name) not in QUICK),
        )
        for name in TRANSFORMS
        for backend in ("numba", "reference", "triton-ieee")
    ],
    indirect=["backend"],
)
def test_compiled_transforms(backend, transform):
    dtype = dtype_of(backend)
    lstm, x = fastlstm.LSTM(3, 4, dtype=dtype, backend=backend), torch.randn(4, 2, 3, dtype=dtype)
    torch.set_default_device(None)  # torch cannot compile jacfwd under one
    function = TRANSFORMS[transform](lambda x: lstm(x)[0])
    torch.testing.assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


@backends
def test_compiled_autocast(backend):
    lstm, x = fastlstm.LSTM(3, 4, backend=backend), torch.randn(5, 2, 3)
    # Triton's interpreter multiplies the bits of bf16 as integers
    dtype = torch.float16 if backend == "triton-ieee" else torch.bfloat16

    def run(x):
        with torch.autocast(x.device.type, dtype):
            return lstm(x)[0]

    got = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    assert got.dtype == dtype
    assert torch.equal(got, run(x))


@pytest.mark.parametrize("freeze", ["parameters", "functional", "no_grad"])
def test_compiled_forward_mode_where_nothing_wants_a_gradient(freeze):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba", dtype=torch.double), torch.randn(5, 2, 3, dtype=torch.double)
    if freeze == "parameters":
        lstm.requires_grad_(False)
    detached = {name: parameter.detach() for name, parameter in lstm.named_parameters()}
    call = (lambda x: functional_call(lstm, detached, (x,))[0]) if freeze == "functional" else lambda x: lstm(x)[0]

    def tangent(x):
        with torch.set_grad_enabled(freeze != "no_grad"):
            return jvp(call, (x,), (torch.ones_like(x),))[1]

    got, want = torch.compile(tangent, backend="aot_eager", fullgraph=True)(x), tangent(x)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(("trained", "lengths"), [(False, None), (False, [5, 2]), (True, None), (True, [0, 4])])
def test_compiled_dual_numbers(trained, lengths, compiler):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba", dtype=torch.double), torch.randn(5, 2, 3, dtype=torch.double)
    lstm.requires_grad_(trained)
    lengths = lengths if lengths is None else torch.tensor(lengths)

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(lstm(forward_ad.make_dual(x, torch.ones_like(x)), lengths=lengths)[0]).tangent

    got, want = torch.compile(tangent, backend=compiler, fullgraph=True)(x), tangent(x)
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want)
    assert forward_ad._current_level == -1


@pytest.mark.skipif(TORCH < (2, 13), reason="torch's own Dynamo takes enter_dual_level from 2.13 on")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_level_without_its_context(compiler):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba").requires_grad_(False), torch.randn(5, 2, 3)

    def tangent(x):
        level = forward_ad.enter_dual_level()
        result = forward_ad.unpack_dual(lstm(forward_ad.make_dual(x, torch.ones_like(x)))[0]).tangent
        forward_ad.exit_dual_level(level=level)
        return result

    got, want = torch.compile(tangent, backend=compiler, fullgraph=True)(x), tangent(x)
    torch.testing.assert_close(got, want)
    assert want.abs().max() > 0.01


@pytest.mark.parametrize("inside", ["", "disabled", "compiled"])
def test_second_derivatives_around_a_break_of_the_graph(inside):
    """What the backward pass runs then lies in frames that dynamo looks at."""
    lstm, x = fastlstm.LSTM(3, 4, backend="numba"), torch.randn(5, 2, 3, requires_grad=True)
    layer = torch.compiler.disable(lstm) if inside == "disabled" else lstm

    def penalty(x, y=None):
        y = layer(x)[0] if y is None else y
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0].pow(2).sum()

    given = () if inside else (lstm(x)[0],)
    got, want = torch.compile(penalty, backend="eager")(x, *given), penalty(x, *given)
    torch.testing.assert_close(got, want)
    weights = list(lstm.parameters())[:2]
    for a, b in zip(*(torch.autograd.grad(value, weights, retain_graph=True) for value in (got, want))):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(
    torch_private.PUBLIC,
    reason="where levels are not known, the reference runs under vmap in a graph, and rounds otherwise",
)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_vmap_where_nothing_wants_a_gradient(compiler):
    lstm, x = fastlstm.LSTM(3, 4, backend="numba").requires_grad_(False), torch.randn(2, 5, 2, 3)
    folded = vmap(lambda x: lstm(x)[0])
    assert torch.equal(torch.compile(folded, backend=compiler, fullgraph=True)(x), folded(x))


def test_operators_in_frames_that_dynamo_sees_are_not_compiled():
    h = torch.zeros(2, 7)
    weights = torch.randn(28, 5), torch.randn(28, 7), None, None

    def alone(x):
        return torch.ops.fastlstm.forward(x, *weights, h, h, None, None, False, False, "numba")[0]

    call, x = torch._dynamo.disable(alone, recursive=False), torch.randn(3, 2, 5)
    with torch.no_grad():
        got = torch.compile(lambda x: call(x) + 1, backend="eager")(x)
        assert torch.equal(got, alone(x) + 1)
    assert counters["frames"]["total"] < 10


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight_hh": torch.ones(16, 5)}, ValueError, "weight_hh must have shape"),
        ({"bias_ih": torch.ones(16).double()}, ValueError, "bias_ih must have the dtype of x"),
        ({"reset": torch.zeros(5, 2)}, TypeError, "reset must be a boolean tensor"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_errors_are_those_of_eager_calls(change, error, words):
    arguments = {"x": torch.randn(5, 2, 3), "hx": None, "weight_ih": torch.ones(16, 3), "weight_hh": torch.ones(16, 4)}
    for call in (fastlstm.lstm, torch.compile(fastlstm.lstm, backend="eager")):
        with pytest.raises(error, match=words):
            call(**{**arguments, **change})


@backends
def test_double_backward_of_compiled_code_is_refused(backend):
    """Torch's own limit; what must not happen is an answer."""
    lstm, x = fastlstm.LSTM(3, 4, backend=backend), torch.randn(5, 2, 3, requires_grad=True)
    output = torch.compile(lstm, backend="aot_eager")(x)[0]
    (gradient,) = torch.autograd.grad(output.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


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
        pytest.param("triton-ieee", False, marks=needs_triton),
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
    done = interpreter.run(LOADED, tmp_path)
    assert done.returncode == 0, done.stderr
    for x, got in zip(inputs, torch.load(tmp_path / "results.pt")):
        x.requires_grad_()
        output, states = lstm(x)
        want = [output, *states, *torch.autograd.grad(output.pow(2).sum(), x)]
        assert all(torch.equal(a, b) for a, b in zip(got, want))


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
    done = interpreter.run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


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
