"""torch.compile: one node a layer and direction whatever T, sizes left open, results as eager's."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import fastlstm
from tests.helpers.layers import needs_native
from tests.helpers.transforms import backends, backends_but_slow, dtype_of, needs_triton

pytestmark = pytest.mark.filterwarnings("error:.*lru_cache")  # dynamo warns of a cache on its way


def graph_of(lstm, T):
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    torch.compile(lstm, backend=counter, fullgraph=True, dynamic=False)(torch.randn(T, 2, 3))
    return [(node.op, str(node.target)) for node in counter.graphs[0].graph.nodes]


@backends_but_slow
def test_the_graph_is_the_same_for_every_length(backend):
    lstm = fastlstm.LSTM(3, 4, num_layers=2, bidirectional=True, backend=backend)
    # Triton's interpreter would take minutes over more
    short, long = (graph_of(lstm, T) for T in ((3, 48) if backend == "triton-ieee" else (16, 1024)))
    assert short == long
    assert sum("_in_graph" in target for _, target in short) == 4


@backends_but_slow
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
        ("numba", STACKED),
        pytest.param("native", {}, marks=needs_native),
        pytest.param("numba", {}, marks=pytest.mark.slow),
        pytest.param("reference", {}, marks=pytest.mark.slow),
        pytest.param("triton-ieee", {}, marks=[needs_triton, pytest.mark.slow]),
        pytest.param("triton-ieee", STACKED, marks=[needs_triton, pytest.mark.slow]),
    ],
    indirect=["backend"],
)
def test_no_second_compilation(backend, options):
    """With open sizes, the first call is the only one that compiles."""
    dtype = dtype_of(backend)
    lstm = fastlstm.LSTM(11, 13, dtype=dtype, backend=backend, **options)
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, compilations = torch.compile(lstm, backend=counter, fullgraph=True, dynamic=True), []
    for T, B in ((4, 3), (5, 3), (7, 5), (2, 33)):
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


def test_operators_in_frames_that_dynamo_sees_are_not_compiled():
    h = torch.zeros(2, 7)
    weights = torch.randn(28, 5), torch.randn(28, 7), None, None

    def alone(x):
        return torch.ops.fastlstm.forward(x, *weights, h, h, None, None, False, False, "numba")[0]

    counters.clear()
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
        ({"reset": torch.zeros(5, 2)}, TypeError, "reset must be booleans"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_errors_are_those_of_eager_calls(change, error, words):
    arguments = {"x": torch.randn(5, 2, 3), "hx": None, "weight_ih": torch.ones(16, 3), "weight_hh": torch.ones(16, 4)}
    for call in (fastlstm.lstm, torch.compile(fastlstm.lstm, backend="eager")):
        with pytest.raises(error, match=words):
            call(**{**arguments, **change})
