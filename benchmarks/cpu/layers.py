"""LSTMs and GRUs beside torch's: sequences, projections, rows of different lengths, numbers of 16 bits, and threads."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from benchmarks.runtimes.cases import make
from benchmarks.runtimes.worker import elsewhere
from benchmarks.shared.calls import called
from benchmarks.shared.case import OURS, Case, Runs, Skip
from benchmarks.shared.clock import thread_counts
from benchmarks.shared.contest import Contest, twins
from benchmarks.shared.shapes import GRID, PROJECTED, SOME, Shape, random_shapes
from fastlstm.backends import dispatch
from fastlstm.cells import Cell, layer_norm_lstm, library

RANDOM = 20
OTHERS = "ONNX Runtime", "OpenVINO"
ZEROS = "starts from a state of zeros, which fastlstm does not multiply"
GRUS = tuple(replace(shape, cell="GRU") for shape in GRID)
BRIEF = {*SOME, *(shape for shape in GRUS if str(shape) in ("GRU-T28-B128-I28-H128", "GRU-T128-B64-I256-H256"))}
BACKENDS = "numba-bf16", "numba-bf16x3", "numba-bf16x6"  # that round float32 or take it in pieces
OF_CELLS = Shape(28, 128, 28, 256)
SIXTEEN_CELLS = (  # and how many heads they have
    (library.gru, 1), (library.mgu, 1), (library.peephole_lstm, 1), (layer_norm_lstm, 1), (library.gru_reset_before, 1),
    (library.slstm, 1), (library.slstm, 4),
)  # fmt: skip
ASKED, COUNTS = (Shape(28, 1, 28, 128), Shape(28, 128, 28, 128)), (16, 64)  # threads, more than there are processors
LENGTHS = (
    *(Shape(T, 32, 64, 64, layers=2) for T in (10, 100, 1000)),
    Shape(100, 32, 64, 64, layers=2, cell="GRU"),
    Shape(200, 8, 64, 128, layers=2),
    Shape(50, 32, 100, 128, bidirectional=True),
    Shape(28, 128, 28, 128),
    Shape(100, 64, 256, 256),
)


def of_layer(shape: Shape, mode: str, backend: str | None = None) -> Runs:
    """Return the calls of a layer, compared with float64."""
    return {**Contest(shape, backend=backend).runs(mode)}


def of_others(shape: Shape, mode: str) -> Runs:
    if mode == "training":
        return {}
    return {**elsewhere(make(mode, shape), OTHERS, thread_counts())}


def null(shape: Shape, mode: str) -> Runs:
    """Return torch's layer twice: what the clock then shows is its own error."""
    return {name: of_layer(shape, mode)["torch"] for name in (OURS, "torch")}


def in_bfloat16(shape: Shape, mode: str) -> Runs:
    contest = Contest(shape, "bfloat16")
    contest.add("ours in float32", shape.module(fastlstm))
    return {**contest.runs(mode)}


def cell_in_bfloat16(cell: Cell, heads: int, shape: Shape, mode: str) -> Runs:
    """Return a layer of a cell in bfloat16 beside itself in float32."""
    half = fastlstm.RNN(cell, shape.I, shape.H, heads=heads).bfloat16()
    x, layers = (
        torch.randn(shape.T, shape.B, shape.I).bfloat16(),
        {OURS: half, "ours in float32": deepcopy(half).float()},
    )
    calls = {name: (layer, x.to(layer.weight_ih_l0.dtype)) for name, layer in layers.items()}
    return {name: called(mode, lambda m=m, x=x: m(x)[0], m.parameters()) for name, (m, x) in calls.items()}


def by_backend(name: str, shape: Shape, mode: str) -> Runs:
    """Return a float32 layer by a backend that has to be asked for, as ours."""
    call = {"cell": library.lstm, "masked": False, "inner_states": False}
    try:
        dispatch.choose(name, torch.device("cpu"), torch.float32, **call)
    except RuntimeError as error:
        raise Skip(str(error)) from error
    return of_layer(shape, mode, name)


def by_threads(shape: Shape, mode: str) -> Runs:
    """Return a layer on all threads beside itself on one."""
    run, threads = Contest(shape).run(OURS, mode), torch.get_num_threads()
    if threads == 1:
        raise Skip("torch has one thread")
    return {OURS: {threads: run}, "one thread": {1: run}}


def packed(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    output, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(output)[0]


def with_lengths(shape: Shape, mode: str) -> Runs:
    """Return calls whose rows have lengths evenly from 1 to T, unsorted, by `lengths` and by packed sequences."""
    (theirs, ours), x = twins(shape), torch.randn(shape.T, shape.B, shape.I)
    lengths = torch.linspace(1, shape.T, shape.B).round().long()
    return {
        OURS: called(mode, lambda: ours(x, lengths=lengths)[0], ours.parameters()),
        "torch": called(mode, lambda: packed(theirs, x, lengths), theirs.parameters()),
        "ours, packed": called(mode, lambda: packed(ours, x, lengths), ours.parameters()),
    }


def case(group: str, shape: Shape, name: str = "", **more: Any) -> Case:
    more |= {"note": ZEROS if shape.T == 1 else "", "is_brief": shape in BRIEF and group != "threads"}
    return Case(group, name or str(shape), partial(of_layer, shape), tolerance=None, **more)


CASES = [
    *(case("layers", shape, others=partial(of_others, shape)) for shape in GRID),
    *(case("layers", shape) for shape in PROJECTED),
    *(Case("layers", f"lengths, {shape}", partial(with_lengths, shape)) for shape in LENGTHS),
    *(case("layers", shape, f"random {shape}") for shape in random_shapes(RANDOM, seed=0)),
    Case("layers", f"torch beside itself, {GRID[0]}", partial(null, GRID[0])),
    *(case("gru", shape, others=partial(of_others, shape)) for shape in GRUS),
    *(Case("sixteen", str(shape), partial(in_bfloat16, shape), tolerance=None) for shape in GRID),
    *(
        Case("sixteen", f"float32 by {name}, {shape}", partial(by_backend, name, shape), tolerance=None)
        for name in BACKENDS
        for shape in SOME
    ),
    *(
        Case("sixteen", f"{cell.name}{f' of {heads} heads' if heads > 1 else ''}, {OF_CELLS}",
             partial(cell_in_bfloat16, cell, heads, OF_CELLS), tolerance=None)
        for cell, heads in SIXTEEN_CELLS  # 16 bits differ by more than a tolerance tells; tests compare with float64
    ),
    *(Case("threads", str(shape), partial(by_threads, shape)) for shape in GRID if shape.B >= 16),
    *(case("threads", shape, f"{n} threads asked for, {shape}", threads=n) for shape in ASKED for n in COUNTS),
]  # fmt: skip
