"""`torch.onnx.export` of our modules: what ONNX Runtime computes from the file is what the module does."""

import copy
import functools
import importlib.util
import io

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastlstm
from tests.helpers.tolerances import close

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"an export to ONNX, and its test, needs {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore:.*_check_is_size:FutureWarning"),  # torch's, of torch
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights:UserWarning"),
]
LSTM, RNN = fastlstm.LSTM, functools.partial(fastlstm.RNN, fastlstm.cells.lstm)
STACKED = {"num_layers": 2, "bidirectional": True, "batch_first": True}


def exported(model, args, open_axes):
    """The bytes of the file; `open_axes` has those that stay open of each tensor among the arguments."""
    sizes = torch.utils._pytree.tree_map(named, open_axes, is_leaf=is_axes)
    program = torch.onnx.export(model.eval(), args, dynamo=True, dynamic_shapes=sizes, verbose=False)
    return program.model_proto.SerializeToString()


def named(axes):
    return dict.fromkeys(axes, torch.export.Dim.DYNAMIC)


def is_axes(a):
    return isinstance(a, tuple) and all(isinstance(k, int) for k in a)


def run(file, args):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feed = {given.name: a.numpy() for given, a in zip(session.get_inputs(), tree_leaves(args))}
    return [torch.from_numpy(a) for a in session.run(None, feed)]


def assert_runs_as(model, file, args):
    close(run(file, args), tree_leaves(model(*args)), "sums")


def arguments(T, B, *, states, options):
    x = torch.randn(B, T, 3) if "batch_first" in options else torch.randn(T, B, 3)
    size = (4 if options else 1), B, 5
    return (x, (torch.randn(size), torch.randn(size))) if states else (x,)


@pytest.mark.parametrize(
    ("options", "states"),
    [
        pytest.param({}, True, marks=pytest.mark.slow),
        (STACKED, True),
        pytest.param({"bias": False, "backend": "aten"}, False, marks=pytest.mark.slow),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param(STACKED, False, marks=pytest.mark.slow),
        pytest.param({"bias": False, "backend": "aten"}, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sequences_of_any_size(options, states):
    """One after the other: torch 2.13 exports an open number of steps of its own LSTM once in a process alone."""
    lstm, open_axes = fastlstm.LSTM(3, 5, **options), ((0, 1), ((1,), (1,))) if states else ((0, 1),)
    stacked = options if options is STACKED else {}
    file = exported(lstm, arguments(6, 4, states=states, options=stacked), open_axes)
    for T, B in ((6, 4), (9, 2), (1, 1)):
        assert_runs_as(lstm, file, arguments(T, B, states=states, options=stacked))


@pytest.mark.parametrize("states", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_cell(states):
    def given(B):
        x = torch.randn(B, 3)
        return (x, (torch.randn(B, 5), torch.randn(B, 5))) if states else (x,)

    cell, open_axes = fastlstm.LSTMCell(3, 5), ((0,), ((0,), (0,))) if states else ((0,),)
    file = exported(cell, given(4), open_axes)
    for B in (4, 7, 1):
        assert_runs_as(cell, file, given(B))


class Tagger(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Linear(3, 6)
        self.lstm = nn.LSTM(6, 5, **options)
        self.head = nn.Linear(10 if options else 5, 2)

    def forward(self, x):
        y = self.lstm(torch.relu(self.embedding(x)))[0]
        return self.head(y.reshape(-1, y.shape[-1])).reshape(y.shape[0], y.shape[1], 2)  # by sizes that are open


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), STACKED], ids=str)
def test_a_replaced_model(options):
    model = Tagger(**options).eval()
    replaced = fastlstm.replace_lstm(copy.deepcopy(model))
    file = exported(replaced, (torch.randn(6, 4, 3),), ((0, 1),))
    for T, B in ((6, 4), (9, 2)):
        assert_runs_as(model, file, (torch.randn(T, B, 3),))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore:Exporting a model to ONNX with a batch_size")
@pytest.mark.parametrize("options", [{}, STACKED], ids=str)
def test_the_older_exporter(options):
    """It calls a module with every argument by position, and so takes ours inside a model alone."""
    model = Tagger(**options).eval()
    replaced, file = fastlstm.replace_lstm(copy.deepcopy(model)), io.BytesIO()
    axes = {"x": {0: "a", 1: "b"}, "y": {0: "a", 1: "b"}}
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes}
    torch.onnx.export(replaced, (torch.randn(6, 4, 3),), file, dynamo=False, **names)
    for T, B in ((6, 4), (9, 2)):
        assert_runs_as(model, file.getvalue(), (torch.randn(T, B, 3),))


class Given(nn.Module):
    """An LSTM with further arguments."""

    def __init__(self, lstm, **given):
        super().__init__()
        self.lstm, self.given = lstm, given

    def forward(self, x):
        return self.lstm(x, **self.given)[0]


@pytest.mark.parametrize(
    ("make", "options", "given", "reason"),
    [
        (LSTM, {}, {"lengths": torch.tensor([6, 3])}, "no reset, and no lengths"),
        (LSTM, {}, {"reset": torch.zeros(6, 2, dtype=torch.bool)}, "no reset, and no lengths"),
        (LSTM, {}, {"return_cells": True}, "does not return the cell states"),
        (LSTM, {"proj_size": 2}, {}, r"no projections \(proj_size\)"),
        (LSTM, {"backend": "reference"}, {}, "an ONNX export takes the aten backend alone: this is reference"),
        (RNN, {"heads": 2}, {}, "aten backend alone: the aten backend runs layers of one head, got heads=2"),
    ],
    ids=["lengths", "reset", "return_cells", "proj_size", "backend", "heads"],
)
@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_an_export_cannot_take_is_named(make, options, given, reason, newer):
    model = Given(make(3, 6, **options), **given).eval()
    with pytest.raises(Exception, match=reason):  # the newer exporter's own error, which quotes ours
        torch.onnx.export(model, (torch.randn(6, 2, 3),), io.BytesIO(), dynamo=newer, verbose=False)


def test_a_call_after_an_export_is_as_before():
    lstm, x = fastlstm.LSTM(3, 5), torch.randn(6, 4, 3)
    before = lstm(x)[0]
    exported(lstm, (x,), ((0, 1),))
    assert torch.equal(lstm(x)[0], before)
    assert "numba" in {node.args[-1] for node in torch.export.export(lstm, (x,)).graph.nodes if node.args}
