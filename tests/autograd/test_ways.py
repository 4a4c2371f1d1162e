"""What runs a call: a call for each row of the table in `fastlstm/call.py`, seen in the graph that it leaves."""

import pytest
import torch
from torch import nn

import fastlstm
from tests.helpers.tolerances import close

T, B, I, H = 4, 3, 5, 6
PLAN, FUNCTION, OPERATION = "PlannedFunctionBackward", "LayerFunctionBackward", "SigmoidBackward0"
WAYS = {PLAN, FUNCTION, OPERATION}


def run(module, *arguments, **options):
    """Return the output of a call, and the names of all nodes of the graph that autograd recorded of it."""
    output = module(*arguments, **options)[0]
    names, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            todo += [following for following, _ in node.next_functions]
    return output, names


@pytest.mark.parametrize(
    ("options", "arguments", "way"),
    [
        ({}, {}, PLAN),
        ({}, {"return_cells": True}, FUNCTION),
        ({"backend": "reference"}, {}, FUNCTION),
        ({"backend": "aten"}, {}, OPERATION),
        ({"proj_size": 2}, {}, PLAN),
    ],
    ids=["plain", "all states", "a backend without plans", "aten", "a projection"],
)
def test_eager_calls(options, arguments, way):
    theirs = nn.LSTM(I, H, proj_size=options.get("proj_size", 0)).double()
    ours, x = fastlstm.LSTM(I, H, **options).double(), torch.randn(T, B, I, dtype=torch.double)
    ours.load_state_dict(theirs.state_dict())
    output, names = run(ours, x, **arguments)
    assert WAYS & names == {way}
    close([output], [theirs(x)[0]], "values")


@pytest.mark.parametrize("backend", ["numba", "native"])
def test_a_call_that_is_plain_once_it_was_cast(backend):
    """Autocast casts for both, and native computes the 16-bit layer in float32."""
    lstm, x = fastlstm.LSTM(I, H, backend=backend), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        output, names = run(lstm, x)
    assert WAYS & names == {PLAN}
    assert "ToCopyBackward0" in names
    assert ("_NarrowedBackward" in names) == (backend == "native")
    want = lstm.double()(x.double())[0]
    assert output.dtype == torch.bfloat16
    close(output, want, "cast")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_call():
    lstm, x = fastlstm.LSTM(I, H).double(), torch.randn(T, B, I, dtype=torch.double)
    traced = torch.jit.trace(lstm, (x,))
    assert any(node.kind().startswith("fastlstm::") for node in traced.inlined_graph.nodes())
    close([traced(2 * x)[0]], [lstm(2 * x)[0]], "values")
