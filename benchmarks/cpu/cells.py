"""Cells of the library in `fastlstm.RNN`, against a plain PyTorch loop, compiled or not, and torch's own layer.

python -m benchmarks.cpu.cells [--only gru mgu] [--shapes T100-B32-I128-H128] [--rounds 31] [--no-compile]

The loop is checked against `fastlstm.RNN` before the clock starts, and the compiled loop against the loop: its output,
and in a training step all its gradients. The compiled loop runs on all threads, and the others on one and on all in
every round, of which the faster counts. To compile a loop of so many steps takes minutes for each row. Two tables for
docs/notes/cells.md are printed row by row. Cells with norms are in `benchmarks.cpu.norms_and_heads`.
"""

import inspect
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlstm
from benchmarks.shared.calls import called, check
from benchmarks.shared.clock import compare
from benchmarks.shared.shapes import MODES, Shape, shape_of
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm import cells
from fastlstm.cells import Cell

TORCH = {
    cells.lstm: nn.LSTM,
    cells.gru: nn.GRU,
    cells.elman_tanh: nn.RNN,
    cells.elman_relu: partial(nn.RNN, nonlinearity="relu"),
}
CONTENDERS = "plain PyTorch loop", "compiled", "torch.nn", "fastlstm"
States = tuple[Tensor, ...]


class Loop(nn.Module):
    """A layer of a cell as one writes it in PyTorch: x is multiplied for all steps at once, and all else at each."""

    def __init__(self, rnn: fastlstm.RNN) -> None:
        super().__init__()
        self.cell, self.hidden_size = rnn.cell, rnn.hidden_size
        self.takes = tuple(inspect.signature(rnn.cell.function).parameters)
        self.of_x, self.of_h = ([gate for gate, sums in rnn.cell.gates.items() if k in sums] for k in "xh")
        self.joint = bool(self.of_x) and self.of_x == self.of_h
        for name, parameter in rnn.named_parameters():
            self.register_parameter(name.removesuffix("_l0"), nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        states: States = tuple([x.new_zeros(x.shape[1], self.hidden_size) for _ in self.cell.states])
        outputs, from_x = [], x
        if self.of_x:
            from_x = F.linear(x, self.weight_ih, self.bias_ih + self.bias_hh if self.joint else self.bias_ih)
        for part, *given in zip(from_x.unbind(0), *(a.unbind(0) for a in inputs.values())):
            states = self.step(states, part, dict(zip(inputs, given)))
            outputs.append(states[0])
        return torch.stack(outputs)

    def step(self, states: States, from_x: Tensor, inputs: dict[str, Tensor]) -> States:
        """The states after a step whose product with x, of all gates that sum it, is `from_x`."""
        values: dict[str, Any] = {}
        if self.joint:
            sums = torch.addmm(from_x, states[0], self.weight_hh.t())
            values = dict(zip(self.of_x, sums.chunk(len(self.of_x), 1)))
        else:
            if self.of_x:
                values = dict(zip(self.of_x, from_x.chunk(len(self.of_x), 1)))
            if self.of_h:
                from_h = F.linear(states[0], self.weight_hh, self.bias_hh)
                for gate, part in zip(self.of_h, from_h.chunk(len(self.of_h), -1)):
                    values[gate] = values[gate] + part if gate in values else part
        values |= {name: partial(F.linear, weight=getattr(self, f"weight_{name}")) for name in self.cell.products}
        values |= (
            {name: getattr(self, name) for name in self.cell.params} | dict(zip(self.cell.states, states)) | inputs
        )
        new = self.cell.function(**{name: values[name] for name in self.takes})
        return new if isinstance(new, tuple) else (new,)


def row_of(cell: Cell, shape: Shape, mode: str, options: Options) -> list[str]:
    torch.manual_seed(0)
    T, B, H, I = shape.T, shape.B, shape.H, shape.I if cell.gates_of_x else 0
    rnn, x, gradient = fastlstm.RNN(cell, I, H), torch.randn(T, B, I), torch.randn(T, B, H)
    inputs = {name: torch.rand(T, B, H) for name in cell.inputs}
    loop = Loop(rnn)
    difference = (rnn(x, None, inputs)[0] - loop(x, inputs)).abs()
    if cell.gates:
        check(difference, torch.zeros_like(difference), 1e-5)
    else:  # of a neuron a rounding may move a spike, and all later ones of the unit
        check(difference.mean(), torch.zeros(()), 1e-3)
    runs: dict[str, Any] = {CONTENDERS[0]: called(mode, lambda: loop(x, inputs), loop.parameters(), gradient)}
    if options.compile:
        torch.compiler.reset()
        module = torch.compile(loop, fullgraph=True, dynamic=False)
        run = called(mode, lambda: module(x, inputs), loop.parameters(), gradient)
        check(run(), runs[CONTENDERS[0]](), 1e-4)  # sums of at most 3200 products in another order differ by 1e-5
        runs["compiled"] = {options.threads: run}  # another count of threads would take as many minutes again
    if cell in TORCH:
        theirs = TORCH[cell](I, H)
        runs["torch.nn"] = called(mode, lambda: theirs(x)[0], theirs.parameters(), gradient)
    runs["fastlstm"] = called(mode, lambda: rnn(x, None, inputs)[0], rnn.parameters(), gradient)
    sides = compare(runs, options.rounds, options.threads)
    ratio = sides["fastlstm"].to(sides[CONTENDERS[0]])
    times = [sides[name].ms if name in sides else "" for name in CONTENDERS]
    return [f"`{cell.name}`", *[str(shape)] * (len(options.shapes) > 1), str(ratio), *times]


if __name__ == "__main__":
    arguments = parser("cpu.cells", __doc__)
    named = {cell.name: cell for cell in cells.CELLS if not cell.derived().means}
    arguments.add_argument("--only", nargs="+", choices=named, default=list(named), metavar="CELL")
    usual = [Shape(100, 32, 128, 128)]
    arguments.add_argument("--shapes", nargs="+", type=shape_of, default=usual, metavar="SHAPE", help="of the layers")
    arguments.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what is compiled")
    options = arguments.parse_args()
    for title, mode in zip(("without gradients", "a training step"), MODES):
        header = [title, *["shape"] * (len(options.shapes) > 1), "ratio", *CONTENDERS]
        layers = product(options.only, options.shapes)
        print_table(header, (row_of(named[name], shape, mode, options) for name, shape in layers))
