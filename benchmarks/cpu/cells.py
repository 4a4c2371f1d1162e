"""Every cell of the library in `fastlstm.RNN`, against a plain PyTorch loop, compiled or not, and torch's own layer.

python -m benchmarks.cpu.cells [--only gru mgu] [--rounds 31] [--no-compile]

The loop is checked against `fastlstm.RNN` before the clock starts, and what is made from it against the loop: its
outputs, and in a training step all its gradients. What cannot run or is wrong is not measured. The loop, `scan` and
torch's layer and fastlstm run on one thread and on all in every round, and the faster counts. What is compiled runs on
all. Two tables for docs/cells.md are printed row by row. To compile a loop of so many steps takes minutes for each row.

"scan" is the same step in torch's `scan`, a loop that a compiler need not unroll.
"""

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlstm
from benchmarks.shared.calls import inference, training
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import parser, print_table
from fastlstm import cells
from fastlstm.cells import Cell

T, B, I, H = 100, 32, 128, 128
TORCH = {
    cells.lstm: nn.LSTM,
    cells.gru: nn.GRU,
    cells.elman_tanh: nn.RNN,
    cells.elman_relu: partial(nn.RNN, nonlinearity="relu"),
}
CONTENDERS = "plain PyTorch loop", "compiled", "scan", "scan compiled", "torch.nn", "fastlstm"
States = tuple[Tensor, ...]


class Loop(nn.Module):
    """A layer of a cell as one writes it in PyTorch: x is multiplied for all steps at once, and h at each.

    With `scans` the loop over the steps is torch's `scan`.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor

    def __init__(self, rnn: fastlstm.RNN, scans: bool = False) -> None:
        super().__init__()
        self.cell, self.scans = rnn.cell, scans
        self.takes = tuple(inspect.signature(rnn.cell.function).parameters)
        self.of_x, self.of_h = ([gate for gate, sums in rnn.cell.gates.items() if k in sums] for k in "xh")
        for name, parameter in rnn.named_parameters():
            self.register_parameter(name.removesuffix("_l0"), nn.Parameter(parameter.detach().clone()))

        self.joint = self.of_x == self.of_h

    def forward(self, x: Tensor) -> Tensor:
        states: States = tuple([x.new_zeros(x.shape[1], H) for _ in self.cell.states])
        from_x = F.linear(x, self.weight_ih, self.bias_ih + self.bias_hh if self.joint else self.bias_ih)
        if self.scans:
            from torch._higher_order_ops.scan import scan  # torch has no public name for it

            def step(states: Any, from_x: Tensor) -> Any:  # whose annotations Dynamo evaluates
                states = self.step(states, from_x)
                return states, states[0].clone()  # the results of a scan may not be the same tensor

            outputs: Tensor = scan(step, states, from_x)[1]
            return outputs
        steps = []
        for part in from_x.unbind(0):
            states = self.step(states, part)
            steps.append(states[0])
        return torch.stack(steps)

    def step(self, states: States, from_x: Tensor) -> States:
        """The states after a step whose product with x, of all gates that sum it, is `from_x`."""
        if self.joint:
            sums = torch.addmm(from_x, states[0], self.weight_hh.t())
            values = dict(zip(self.of_x, sums.chunk(len(self.of_x), 1)))
        else:
            values = dict(zip(self.of_x, from_x.chunk(len(self.of_x), 1)))
            from_h = F.linear(states[0], self.weight_hh, self.bias_hh) if self.of_h else from_x.new_zeros(0)
            for gate, part in zip(self.of_h, from_h.chunk(max(len(self.of_h), 1), -1)):
                values[gate] = values[gate] + part if gate in values else part
        values |= {name: getattr(self, name) for name in self.cell.params} | dict(zip(self.cell.states, states))
        new = self.cell.function(**{name: values[name] for name in self.takes})
        return new if isinstance(new, tuple) else (new,)


def prepared(mode: str, call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Run:
    """Return `call`, which runs the module, without gradients or with the backward pass."""
    if mode == "inference":
        return inference(lambda: call(x))
    gradient = torch.randn(T, B, H, generator=torch.Generator().manual_seed(0))
    return training(lambda: call(x), module.parameters(), gradient)


def results_of(run: Run, module: nn.Module) -> dict[str, Tensor | None]:
    """Return the output, and the gradients of the parameters or None."""
    result: Any = run()
    output = result[0] if isinstance(result, list) else result
    return {"output": output, **{f"gradient of {name}": a.grad for name, a in module.named_parameters()}}


def works(name: str, run: Run, module: nn.Module, expected: dict[str, Tensor | None]) -> bool:
    """Return whether it runs, with the expected results. Else it says what is wrong."""
    start = time.perf_counter()
    try:
        results = results_of(run, module)
    except Exception as error:  # whatever a compiler raises
        print(f"not measured: {name}: {type(error).__name__}", file=sys.stderr)
        return False
    print(f"the first run of {name} took {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for what, a in expected.items():
        b = results[what]
        # sums of at most 3200 products in another order differ by less than 1e-5 of the largest
        if a is not None and (b is None or float((b - a).abs().max()) > 1e-4 * max(1.0, float(a.abs().max()))):
            print(f"not measured: {name}: wrong {what}", file=sys.stderr)
            return False
    return True


def row_of(cell: Cell, mode: str, rounds: int, threads: int, compiles: bool) -> list[str]:
    torch.manual_seed(0)
    rnn, x = fastlstm.RNN(cell, I, H), torch.randn(T, B, I)
    loop = Loop(rnn)
    torch.testing.assert_close(rnn(x)[0], loop(x), rtol=0, atol=1e-5)
    runs: dict[str, Any] = {"plain PyTorch loop": prepared(mode, loop, loop, x)}
    expected = results_of(runs["plain PyTorch loop"], loop)
    torch.compiler.reset()
    for scans, name in ((False, "compiled"), (True, "scan"), (True, "scan compiled")):
        module = Loop(rnn, scans)
        called = torch.compile(module, fullgraph=True, dynamic=False) if name.endswith("compiled") else module
        run = prepared(mode, called, module, x)
        if (compiles or called is module) and works(name, run, module, expected):
            # what is compiled belongs to one count of threads, and another would take as many minutes again
            runs[name] = run if called is module else {threads: run}
    if cell in TORCH:
        theirs = TORCH[cell](I, H)
        runs["torch.nn"] = prepared(mode, lambda x: theirs(x)[0], theirs, x)
    runs["fastlstm"] = prepared(mode, lambda x: rnn(x)[0], rnn, x)
    sides = compare(runs, rounds, threads)
    ratio = sides["fastlstm"].to(sides["plain PyTorch loop"])
    return [f"`{cell.name}`", *(sides[name].ms if name in sides else "" for name in CONTENDERS), str(ratio)]


def main() -> None:
    arguments, named = parser("cpu.cells", __doc__), {cell.name: cell for cell in cells.CELLS}
    arguments.add_argument("--only", nargs="+", choices=named, default=list(named), metavar="CELL")
    arguments.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what is compiled")
    options = arguments.parse_args()

    def rows(mode: str) -> Iterator[list[str]]:
        for name in options.only:
            yield row_of(named[name], mode, options.rounds, options.threads, options.compile)

    for title, mode in zip(("without gradients", "a training step"), MODES):
        print_table([title, *CONTENDERS, "ratio"], rows(mode))


if __name__ == "__main__":
    main()
