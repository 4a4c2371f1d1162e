"""Every cell of the library in `fastlstm.RNN`, against a plain PyTorch loop, compiled or not, and torch's own layer.

python -m benchmarks.cells [--only gru mgu] [--pairs 31] [--no-compile]

The loop is checked against `fastlstm.RNN` before the clock starts. It and torch's layer run on one thread and on all in
every round, and the faster one counts. What is compiled runs on all. Two tables for docs/cells.md are printed row by
row. To compile a loop of so many steps takes minutes for each row.
"""

import argparse
import inspect
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlstm
from benchmarks import machine
from benchmarks.clock import Contender, interleaved, ratio_of, thread_counts
from fastlstm import cells
from fastlstm.cells import Cell

T, B, I, H = 100, 32, 128, 128
TORCH = {
    cells.lstm: nn.LSTM,
    cells.gru: nn.GRU,
    cells.elman_tanh: nn.RNN,
    cells.elman_relu: partial(nn.RNN, nonlinearity="relu"),
}
CONTENDERS = "plain PyTorch loop", "compiled", "torch.nn", "fastlstm"
Run = Callable[[], object]


class Loop(nn.Module):
    """A layer of a cell as one writes it in PyTorch: x is multiplied for all steps at once, and h at each."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    def __init__(self, rnn: fastlstm.RNN) -> None:
        super().__init__()
        self.cell = rnn.cell
        self.takes = tuple(inspect.signature(rnn.cell.function).parameters)
        self.of_x, self.of_h = ([gate for gate, sums in rnn.cell.gates.items() if k in sums] for k in "xh")
        for name, parameter in rnn.named_parameters():
            self.register_parameter(name.removesuffix("_l0"), nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        states = [x.new_zeros(x.shape[1], H) for _ in self.cell.states]
        params = {name: getattr(self, name) for name in self.cell.params}
        joint = self.of_x == self.of_h
        bias = self.bias_ih + self.bias_hh if joint else self.bias_ih
        outputs = []
        for from_x in F.linear(x, self.weight_ih, bias).unbind(0):
            if joint:
                sums = torch.addmm(from_x, states[0], self.weight_hh.t())
                given = dict(zip(self.of_x, sums.chunk(len(self.of_x), 1)))
            else:
                given = dict(zip(self.of_x, from_x.chunk(len(self.of_x), 1)))
                from_h = F.linear(states[0], self.weight_hh, self.bias_hh) if self.of_h else x.new_zeros(0)
                for gate, part in zip(self.of_h, from_h.chunk(max(len(self.of_h), 1), -1)):
                    given[gate] = given[gate] + part if gate in given else part
            given |= params | dict(zip(self.cell.states, states))
            new = self.cell.function(**{name: given[name] for name in self.takes})
            states = list(new) if isinstance(new, tuple) else [new]
            outputs.append(states[0])
        return torch.stack(outputs)


def inference(module: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> Run:
    def run() -> object:
        with torch.no_grad():
            return module(x)

    return run


def training(module: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> Run:
    """Forward and backward. The gradients are dropped, the weights stay."""
    gradient = torch.randn(T, B, H)

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        module(x).backward(gradient)

    return run


def works(run: Run) -> bool:
    try:
        run()
    except Exception as error:  # whatever a compiler raises
        print(f"not measured: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return False
    return True


def measure(cell: Cell, kind: Callable[..., Run], pairs: int, compiles: bool) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    rnn, x = fastlstm.RNN(cell, I, H), torch.randn(T, B, I)
    loop = Loop(rnn)
    torch.testing.assert_close(rnn(x)[0], loop(x), rtol=0, atol=1e-5)
    rivals = {"plain PyTorch loop": kind(loop, list(loop.parameters()), x)}
    if compiles:
        torch.compiler.reset()
        compiled = kind(torch.compile(loop, fullgraph=True, dynamic=False), list(loop.parameters()), x)
        if works(compiled):
            rivals["compiled"] = compiled
    if cell in TORCH:
        theirs = TORCH[cell](I, H)
        rivals["torch.nn"] = kind(lambda x: theirs(x)[0], list(theirs.parameters()), x)
    threads = torch.get_num_threads()
    contenders = {"fastlstm": Contender(kind(lambda x: rnn(x)[0], list(rnn.parameters()), x), threads)}
    for name, run in rivals.items():
        # what is compiled belongs to one count of threads, and another would take as many minutes again
        for count in [threads] if name == "compiled" else thread_counts(threads):
            contenders[f"{name} {count}"] = Contender(run, count)
    times = interleaved(contenders, pairs)
    best = {"fastlstm": times["fastlstm"]}
    for name in rivals:
        of_counts = [values for key, values in times.items() if key.rpartition(" ")[0] == name]
        best[name] = min(of_counts, key=statistics.median)
    ratio = ratio_of(best["plain PyTorch loop"], best["fastlstm"])
    columns = [f"{statistics.median(best[name]) * 1e3:.2f} ms" if name in best else "" for name in CONTENDERS]
    return f"| `{cell.name}` | {' | '.join(columns)} | **{ratio.median:.2f}** ({ratio.low:.2f}–{ratio.high:.2f}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = {cell.name: cell for cell in cells.CELLS}
    parser.add_argument("--only", nargs="+", choices=named, default=list(named), metavar="CELL")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what takes minutes")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{machine.cpu_name()}, {threads} threads, load {machine.load()}, torch {torch.__version__}")
    for title, kind in (("a training step", training), ("without gradients", inference)):
        print(f"\n| {title} | {' | '.join(CONTENDERS)} | ratio |\n|---|{'---|' * len(CONTENDERS)}---|")
        for name in options.only:
            print(measure(named[name], kind, options.pairs, options.compile), flush=True)


if __name__ == "__main__":
    main()
