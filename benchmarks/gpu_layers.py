"""The part of `benchmarks.gpu` that touches the device: layers checked and timed, one JSON object a line.

    python -m benchmarks.gpu_layers [--dry-run] [--rounds N] [--compile] ITEM ...
    python -m benchmarks.gpu_layers [--dry-run] --exercise BACKEND ...

An item is a shape's number, a precision and rivals: "0:bf16:torchrl,flashrnn". Each line names its item: that it began,
what was left out and why, a row of times, or that it failed. After a fault that the device does not get over, the
process ends with status 3 and leaves the items behind it to another; so it does with status 5, FRESH, after an item in
which a graph could not be captured, which is no failure. With --compile nothing is timed: each layer of
ours runs once, so that its kernels lie in Triton's cache. --exercise is what compute-sanitizer looks at.
"""

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import fastlstm
from benchmarks.clock import ratio_of
from benchmarks.contest import inference, training
from benchmarks.gpu_rivals import rivals
from benchmarks.shapes import MODES, Shape
from fastlstm import cells
from fastlstm.backends import dispatch

SHAPES = (
    Shape(28, 128, 28, 128),  # the row-LSTM
    Shape(1024, 16, 768, 768),
    Shape(512, 64, 128, 128),
    Shape(128, 128, 512, 512),  # cuDNN's best case: fp16, I and H multiples of 128
    Shape(512, 64, 64, 64),
    Shape(512, 64, 256, 256),
    Shape(512, 64, 512, 512),
    Shape(512, 64, 1024, 1024),
)


@dataclass(frozen=True)
class GRUShape(Shape):
    """Of a GRU in place of an LSTM."""

    cell = "GRU"

    def __str__(self) -> str:
        return f"GRU-{super().__str__()}"


# What is measured beside the LSTM's layers, if the backend has kernels for it
GRUS = (GRUShape(28, 128, 28, 128), GRUShape(512, 64, 256, 256)) if dispatch.runs("triton", cells.gru) else ()
MEASURED = (*SHAPES, *GRUS)
TINY = (Shape(3, 2, 4, 8), Shape(2, 2, 4, 40))
# name of a precision: dtype, whether float32 products may be in tf32, largest error allowed of the largest value
PRECISIONS = {
    "tf32": (torch.float32, True, 3e-3),
    "ieee": (torch.float32, False, 2e-5),
    "bf16": (torch.bfloat16, False, 8e-2),
    "fp16": (torch.float16, False, 1e-2),
}
WAYS = ("eager", "graph")
WARM_UP, LEAST_ROUNDS, SECONDS = 3, 7, 3.0  # a measurement ends after so long, once it has its least rounds
FLUSH = 256 * 2**20  # bytes, several times the L2 cache
FRESH = 5  # status of a process that has said all of an item and wants another to go on


def set_precision(name: str) -> torch.dtype:
    """Torch's and with it cuDNN's, which the triton backend follows.

    By the older names: once the newer ones are set, torch refuses to read the older, as torch.compile and TorchRL do.
    """
    dtype, tf32, _ = PRECISIONS[name]
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    return dtype


def is_cuda(device: str) -> bool:
    return device == "cuda"


class Bench:
    """One shape in one precision: the modules with the same weights, and the inputs that each takes."""

    def __init__(self, shape: Shape, precision: str, device: str, names: list[str]) -> None:
        self.shape, self.precision, self.device = shape, precision, device
        dtype = set_precision(precision)
        torch.manual_seed(0)
        cell = getattr(shape, "cell", "LSTM")
        self.torchs, kind = f"nn.{cell}", getattr(nn, cell)  # torch's own module is the first contender
        theirs, self.exact = kind(shape.I, shape.H), kind(shape.I, shape.H).double()
        ours = getattr(fastlstm, cell)(shape.I, shape.H, backend="triton")
        ours.load_state_dict(theirs.state_dict())
        others, self.left_out = rivals(theirs, shape, precision, names)
        modules: dict[str, nn.Module] = {self.torchs: theirs, "fastlstm": ours, **others}
        self.modules = {name: module.to(device, dtype) for name, module in modules.items()}
        self.x = torch.randn(shape.T, shape.B, shape.I).to(device, dtype)
        self.doutput = torch.randn(shape.T, shape.B, shape.H).to(device, dtype)
        self.errors: dict[str, float] = {}
        self.same_bits = False  # in two runs of ours, once `check` has seen them
        self.spoiled = ""  # by whose failed capture: torch's allocator may still be in it

    def given(self, name: str) -> tuple[Tensor, Tensor]:
        """x and doutput as this module takes them."""
        if self.modules[name].batch_first:
            return self.x.transpose(0, 1).contiguous(), self.doutput.transpose(0, 1).contiguous()
        return self.x, self.doutput

    def check(self) -> None:
        """Errors of output and gradients against float64, of the largest value.

        Ours may be three times torch's own, or the precision's limit; beyond that this raises. A rival that raises,
        or is further off, is left out.
        """
        exact = self.exact.to(self.device)
        exact.load_state_dict(self.modules[self.torchs].state_dict())
        want = results(exact, self.x.double(), self.doutput.double())
        limit = PRECISIONS[self.precision][2]
        for name in list(self.modules):
            try:
                got = results(self.modules[name], *self.given(name))
                error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))
                if name == "fastlstm":
                    self.same_bits = all(map(torch.equal, got, results(self.modules[name], *self.given(name))))
                if name == self.torchs:
                    limit = max(limit, 3 * error)
                elif not error <= limit:  # NaN is an error too
                    raise AssertionError(f"{name} is {error:.1e} from float64, allowed {limit:.0e}")
            except Exception as problem:
                if name in (self.torchs, "fastlstm"):
                    raise
                self.leave_out(name, problem)
            else:
                self.errors[name] = error

    def leave_out(self, name: str, problem: Exception) -> None:
        self.left_out[name] = f"{type(problem).__name__}: {problem}"[:500]
        del self.modules[name]

    def run(self, name: str, mode: str) -> Callable[[], object]:
        x, doutput = self.given(name)
        module = self.modules[name]
        return inference(module, x) if mode == "inference" else training(module, x, doutput)

    @functools.cached_property
    def graphs(self) -> dict[str, dict[str, Callable[[], object]]]:
        """By mode, the calls that a graph can hold: some rivals allocate or wait on their way. Ours come first, since
        after a failed capture no other is tried.
        """
        found: dict[str, dict[str, Callable[[], object]]] = {mode: {} for mode in MODES}
        for name in sorted(self.modules, key=lambda name: name != "fastlstm"):
            for mode in MODES:
                try:
                    if self.spoiled:
                        raise RuntimeError(f"not tried in this process after {self.spoiled}")
                    found[mode][name] = graphed(self.run(name, mode))
                except Exception as problem:
                    self.spoiled = self.spoiled or f"{name} {mode}"
                    if name == "fastlstm":
                        raise
                    self.left_out[f"{name} {mode} from a graph"] = f"{type(problem).__name__}: {problem}"[:500]
        return found

    def times(self, mode: str, way: str, rounds: int) -> dict[str, list[float]]:
        """Seconds a call of every module that can run so, round by round."""
        runs = self.graphs[mode] if way == "graph" else {name: self.run(name, mode) for name in self.modules}
        return interleaved(runs, rounds, self.device, way == "eager")

    def rows(self, rounds: int) -> Iterator[dict[str, Any]]:
        for way in WAYS if is_cuda(self.device) else WAYS[:1]:
            for mode in MODES:
                yield self.row(mode, way, self.times(mode, way, rounds))

    def row(self, mode: str, way: str, times: Mapping[str, list[float]]) -> dict[str, Any]:
        seconds = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
        ours = times["fastlstm"]
        ratios = {name: asdict(ratio_of(values, ours)) for name, values in times.items() if name != "fastlstm"}
        return {
            "name": str(self.shape), "shape": asdict(self.shape), "precision": self.precision, "mode": mode, "way": way,
            "seconds": seconds, "errors": self.errors, "same_bits": self.same_bits, "rounds": len(ours),
            "microseconds_a_step": 1e6 * seconds["fastlstm"] / self.shape.T,
            "ratios": ratios,
        }  # fmt: skip


def results(module: nn.Module, x: Tensor, doutput: Tensor) -> list[Tensor]:
    """Output and gradients in float64, the output time first."""
    output = module(x)[0]
    gradients = torch.autograd.grad(output, list(module.parameters()), doutput)
    output = output.transpose(0, 1) if module.batch_first else output
    return [a.detach().double() for a in (output, *gradients)]


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The current stream stays the same: torch's own context leaves the capture's where the capture fails."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_of(run: Callable[[], object], device: str) -> float:
    """By CUDA events where the device has them."""
    if not is_cuda(device):
        before = time.perf_counter()
        run()
        return time.perf_counter() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def memory_beyond_the_cache(device: str) -> Tensor:
    return torch.empty(FLUSH if is_cuda(device) else 1, dtype=torch.int8, device=device)


def interleaved(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str, waits: bool
) -> dict[str, list[float]]:
    """Seconds a call in each round, the L2 cache flushed before it; every second round runs in the opposite order.

    `waits`: for the flush to end, so that the host's time counts. Queued behind it, a call would hide 90 us of that.
    """
    flush = memory_beyond_the_cache(device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, began = list(runs), time.monotonic()
    for n in range(WARM_UP + rounds):
        if n >= WARM_UP + LEAST_ROUNDS and time.monotonic() - began > SECONDS:
            break
        for name in order if n % 2 == 0 else reversed(order):
            flush.zero_()
            if waits and is_cuda(device):
                torch.cuda.synchronize()
            seconds = seconds_of(runs[name], device)
            if n >= WARM_UP:
                times[name].append(seconds)
    return times


def say(item: str, **found: Any) -> None:
    print(json.dumps({"item": item, **found}), flush=True)


def parsed(item: str, dry_run: bool) -> tuple[Shape, str, str, list[str]]:
    """Shape, precision, device and rivals."""
    number, precision, names = item.split(":")
    shape = (TINY if dry_run else MEASURED)[int(number)]
    return shape, precision, "cpu" if dry_run else "cuda", [name for name in names.split(",") if name]


def compile_kernels(item: str, dry_run: bool) -> None:
    bench = Bench(*parsed(item, dry_run)[:3], [])
    for mode in MODES:
        bench.run("fastlstm", mode)()


def exercise(backend: str, device: str) -> None:
    """All that the kernels have variants for, on few rows: with and without lengths, resets, biases and saved gates;
    gradients of the output, of cell states and of the last states alone; both directions; several groups of weights.
    """
    from fastlstm.backends.triton import launch

    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor ends where its memory does
    launch.project = project
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    x = torch.randn(3, 9, 28, device=device, dtype=dtype)
    lengths, reset = torch.tensor([3, 0, 1, 2, 3, 3, 2, 1, 3]), torch.arange(27, device=device).view(3, 9) % 4 == 0
    for H in (40, 64 if backend == "triton-ieee" else 128, 200):  # resident, padded and as wide as it is; stepwise
        lstm, bare, *stack = (
            fastlstm.LSTM(28, H, bias=bias, bidirectional=both, backend=backend, device=device, dtype=dtype)
            for bias, both in ((True, True), (False, False), (True, False), (True, False))
        )
        with torch.no_grad():
            lstm(x)
        lstm(x)[0].sum().backward()
        output, _, cells = lstm(x, lengths=lengths, return_cells=True)
        (output.sum() + cells.sum()).backward()
        stack[0](x, lengths=lengths, reset=reset)[0].sum().backward()  # resets need one direction
        sum(state.sum() for state in bare(x, reset=reset)[1]).backward()
        weights, _ = stack_module_state(stack)
        vmap(lambda weights, model=stack[0]: functional_call(model, weights, (x,))[0])(weights).sum().backward()


def project(x: Tensor, weight_ih: Tensor, bias: Tensor | None) -> Tensor:
    """As in `launch`, without the matrix unit: initcheck may not see what cuBLAS writes with bulk copies."""
    stack = weight_ih.view(-1, 1, *weight_ih.shape[-2:])  # (G,1,4H,I)
    product = (x.unflatten(1, (stack.shape[0], -1)).unsqueeze(-2) * stack).sum(-1)  # (T,G,rows,4H)
    return (product if bias is None else product + bias.view(-1, 1, bias.shape[-1])).flatten(1, 2)


def measure(item: str, rounds: int, dry_run: bool) -> None:
    say(item, began=True)
    bench = None
    try:
        bench = Bench(*parsed(item, dry_run))
        bench.check()
        for row in bench.rows(rounds):
            say(item, row=row)
        if bench.left_out:
            say(item, left_out=bench.left_out)
    except Exception:
        say(item, failed=traceback.format_exc()[-3000:])
        if not dry_run:
            try:
                torch.cuda.synchronize()
            except Exception:  # an illegal access ends every later call of this process
                sys.exit(3)
    if bench is not None and bench.spoiled:
        sys.exit(FRESH)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_layers")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--exercise", action="store_true")
    parser.add_argument("items", nargs="+", metavar="ITEM")
    options = parser.parse_args()
    for item in options.items:
        if options.exercise:
            exercise(item, "cpu" if options.dry_run else "cuda")
        elif options.compile:
            compile_kernels(item, options.dry_run)
        else:
            measure(item, options.rounds, options.dry_run)


if __name__ == "__main__":
    main()
