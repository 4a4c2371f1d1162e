"""The source of what is derived."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlstm import cells
from fastlstm.cells.emit import load, python
from fastlstm.cells.graph import Graph
from fastlstm.cells.on_tensors import ON_TENSORS

ALL = """
from fastlstm import cells
from fastlstm.cells.emit import python
for cell in cells.CELLS:
    derived = cell.derived()
    print(derived)
    for name in ("forward", "backward"):
        print(python(getattr(derived, name)))
"""


@pytest.mark.slow
def test_every_process_writes_the_same():
    here = Path(cells.__file__).parents[2]
    texts = set()
    for seed in "012":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(here)}
        texts.add(subprocess.run([sys.executable, "-c", ALL], env=environment, check=True, capture_output=True).stdout)
    assert len(texts) == 1


def test_the_forward_pass_of_the_lstm():
    assert python(cells.lstm.derived().forward, "lstm_forward") == (
        "def lstm_forward(i_pre, f_pre, g_pre, o_pre, c_prev):\n"
        '    """h, c, i, f, g, o"""\n'
        "    i = sigmoid(i_pre)\n"
        "    f = sigmoid(f_pre)\n"
        "    g = tanh(g_pre)\n"
        "    o = sigmoid(o_pre)\n"
        "    c = f * c_prev + i * g\n"
        "    h = o * tanh(c)\n"
        "    return h, c, i, f, g, o\n"
    )


def test_source_can_be_read_back():
    """As triton.jit does, which also asks for the module."""
    source = python(cells.gru.derived().forward)
    function = load(source, "forward", ON_TENSORS)
    assert inspect.getsource(function) == source
    assert function.__module__ == "fastlstm.cells.emit"
    assert inspect.getmodule(function) is not None


def test_one_copy_of_what_is_equal():
    graph = Graph()
    a, b = graph.input("a"), graph.input("b")
    assert a * b is b * a
    assert a + b is b + a
    assert (a - b) is not (b - a)
    assert a * 1.0 is a
    assert a + 0 is a
    assert 0.0 - (-a) is a
    assert (-a) * b is -(a * b)
    assert a - (-b) is a + b
    assert (2.0 * (3.0 * a)) is 6.0 * a
    assert (a * 0.0).op == "mul"  # NaN times zero is NaN
    assert (a - a).op == "sub"


def test_constants_have_the_type_of_values():
    @cells.cell(gates={"a": "xh"}, states=("h",))
    def step(a, h):
        return cells.where(a > 0.0, 0.1, 0.7) * h + cells.maximum(a, 0.3)

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        a, h = torch.randn(2, 9).to(dtype)
        found = step.derived().forward({"a_pre": a, "h_prev": h})["h"]
        assert found.dtype is dtype
        want = torch.where(a > 0, torch.tensor(0.1, dtype=dtype), torch.tensor(0.7, dtype=dtype)) * h
        assert torch.equal(found, want + torch.maximum(a, torch.tensor(0.3, dtype=dtype)))
