"""Layers of cells beside a loop in plain PyTorch, that loop compiled, and torch's own layer where there is one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.cpu import plain
from benchmarks.cpu.plain import HEADS, UNITS, Loop
from benchmarks.shared.calls import called
from benchmarks.shared.case import OURS, Case, Runs
from benchmarks.shared.shapes import Shape
from fastlstm import cells
from fastlstm.cells import Cell

TORCH = {
    cells.lstm: nn.LSTM,
    cells.gru: nn.GRU,
    cells.elman_tanh: nn.RNN,
    cells.elman_relu: partial(nn.RNN, nonlinearity="relu"),
}
USUAL, SMALL, ONE_ROW = Shape(100, 32, 128, 128), Shape(28, 128, 28, 128), Shape(50, 1, 40, 128)
SIZES = SMALL, ONE_ROW  # of those cells
WITH_PRODUCTS = (cells.gru, cells.gru_reset_before, cells.lem, cells.multiplicative_lstm)
COMPILED = (cells.lstm, cells.mgu, cells.slstm)  # whose loops torch.compile takes a minute or more for
NORMS = (SMALL, Shape(100, 16, 64, 256), ONE_ROW, Shape(50, 16, 512, 512), Shape(50, 64, 1024, 1024))
OF_NORMS: dict[Cell, tuple[Callable[..., Tensor], Cell]] = {  # in plain PyTorch, and the cell without norms
    cells.layer_norm_lstm: (plain.layer_norm_lstm, cells.peephole_lstm),
    cells.dreamer_gru: (plain.dreamer_gru, cells.gru),
}
STEPS = 64
OF_HEADS = Shape(STEPS, 16, UNITS, HEADS * UNITS)
OF_NORMALIZED = 2e-3  # sums of up to 6400 terms, whose roundings grow over 100 steps of normalized states


def of_cell(cell: Cell, shape: Shape, is_compiled: bool, mode: str) -> Runs:
    T, B, H, I = shape.T, shape.B, shape.H, shape.I if cell.gates_of_x else 0
    rnn, x, gradient = fastlstm.RNN(cell, I, H), torch.randn(T, B, I), torch.randn(T, B, H)
    inputs, loop = {name: torch.rand(T, B, H) for name in cell.inputs}, Loop(rnn)
    runs: Runs = {
        OURS: called(mode, lambda: rnn(x, None, inputs)[0], rnn.parameters(), gradient),
        "a loop in PyTorch": called(mode, lambda: loop(x, inputs), loop.parameters(), gradient),
    }
    if is_compiled:
        torch.compiler.reset()
        module = torch.compile(loop, fullgraph=True, dynamic=False)
        compiled = called(mode, lambda: module(x, inputs), loop.parameters(), gradient)
        runs["the loop, compiled"] = {torch.get_num_threads(): compiled}  # another count would take as long again
    if cell in TORCH:
        theirs = TORCH[cell](I, H)
        theirs.load_state_dict(rnn.state_dict())
        runs["torch"] = called(mode, lambda: theirs(x)[0], theirs.parameters(), gradient)
    return runs


def layer(cell: Cell, x: Tensor, H: int, mode: str, heads: int = 1) -> tuple[nn.Module, Callable[[], Any]]:
    """Return a layer of a cell, and its call."""
    rnn = fastlstm.RNN(cell, x.shape[-1], H, heads=heads, backend="numba")
    return rnn, called(mode, lambda: rnn(x)[0], rnn.parameters())


def beside_plain(cell: Cell, function: Any, without: Cell | None, shape: Shape, heads: int, mode: str) -> Runs:
    """Return a layer, the same in plain PyTorch, and a layer with the same products and no norms."""
    x = torch.randn(shape.T, shape.B, shape.I)
    rnn, ours = layer(cell, x, shape.H, mode, heads)
    weights = {name.removesuffix("_l0"): a for name, a in rnn.named_parameters()}
    runs = {OURS: ours, "a loop in PyTorch": called(mode, lambda: function(x, weights), weights.values())}
    return runs if without is None else runs | {"ours without norms": layer(without, x, shape.H, mode, heads)[1]}


def of_heads(B: int, mode: str) -> Runs:
    """Return an sLSTM with heads, whose x comes as inputs, beside a loop with one `torch.bmm` a step."""
    H, cell = HEADS * UNITS, plain.slstm_of_inputs
    inputs = tuple(torch.randn(STEPS, B, H) for _ in cell.inputs)
    rnn = fastlstm.RNN(cell, 0, H, bias=False, heads=HEADS, backend="numba")
    named, leaves = dict(zip(cell.inputs, inputs)), list(rnn.parameters())
    return {
        OURS: called(mode, lambda: rnn(None, inputs=named)[0], leaves),
        "a loop in PyTorch": called(mode, lambda: plain.slstm_of_heads(inputs, rnn.weight_hh_l0), leaves),
    }


def case(cell: Cell, shape: Shape, is_compiled: bool = False) -> Case:
    name = f"{cell.name}, {shape}" + ", beside the loop compiled" * is_compiled
    tolerance = 1e-4 if cell.gates else None  # of a neuron a rounding may move a spike, and all later ones of the unit
    return Case("cells", name, partial(of_cell, cell, shape, is_compiled), tolerance=tolerance)


def normalized(name: str, build: Callable[[str], Runs], is_brief: bool = False) -> Case:
    return Case("cells", name, build, tolerance=OF_NORMALIZED, unlike=("ours without norms",), is_brief=is_brief)


CASES = [
    *(case(cell, USUAL) for cell in cells.CELLS if not cell.derived().means),
    *(case(cell, shape) for shape in SIZES for cell in WITH_PRODUCTS),
    *(case(cell, SMALL, is_compiled=True) for cell in COMPILED),
    *(
        normalized(f"{cell.name}, {shape}", partial(beside_plain, cell, function, without, shape, 1),
                   is_brief=(cell, shape) == (cells.layer_norm_lstm, SMALL))
        for cell, (function, without) in OF_NORMS.items()
        for shape in NORMS
    ),
    *(normalized(f"slstm, {HEADS} heads, T{STEPS}-B{B}-H{HEADS * UNITS}", partial(of_heads, B)) for B in (1, 16, 64)),
    normalized(
        f"lstm whose {HEADS} heads have norms, {OF_HEADS}",
        partial(beside_plain, plain.normed_lstm("head"), plain.normed_lstm_of_heads, None, OF_HEADS, HEADS),
    ),
]  # fmt: skip
