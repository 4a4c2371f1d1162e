"""Everything a GPU has to decide, in under eight minutes: checks, times against cuDNN, training; one JSON, one chart.

    python -m benchmarks.gpu [--minutes 5] [--out benchmarks/results] [--dry-run]

Times are medians of CUDA events, the L2 cache flushed before each call, eager and replayed from a CUDA graph, rounds of
all contenders interleaved. `--dry-run`, with TRITON_INTERPRET=1 in the environment, takes tiny layers on the CPU and no
training: it shows that the script runs.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastlstm
from benchmarks import machine
from benchmarks.contest import inference, training
from benchmarks.report import replaced
from benchmarks.shapes import Shape
from fastlstm.backends.triton import INTERPRET

ROOT = Path(__file__).parents[1]
SHAPES = (  # in the order of their weight: time may run out
    Shape(28, 128, 28, 128),  # the row-LSTM
    Shape(1024, 16, 768, 768),
    Shape(512, 64, 128, 128),
    Shape(128, 128, 512, 512),  # cuDNN's best case: fp16, I and H multiples of 128
    Shape(512, 64, 64, 64),
    Shape(512, 64, 256, 256),
    Shape(512, 64, 512, 512),
    Shape(512, 64, 1024, 1024),
)
TINY = (Shape(3, 2, 4, 8), Shape(2, 2, 4, 40))
# name of a precision: dtype, torch's setting for cuDNN's LSTM, largest error allowed of the largest value
PRECISIONS = {
    "tf32": (torch.float32, "tf32", 3e-3),
    "ieee": (torch.float32, "ieee", 2e-5),
    "bf16": (torch.bfloat16, "ieee", 8e-2),
    "fp16": (torch.float16, "ieee", 1e-2),
}
MODES = ("inference", "training")


def step_loop(module: nn.LSTM) -> Callable[[Tensor], tuple[Tensor, Any]]:
    """The layer as a loop of torch operations, compiled: what somebody without a kernel would write."""
    w_ih, w_hh, b_ih, b_hh = module.all_weights[0]

    def forward(x: Tensor) -> tuple[Tensor, Any]:
        preact = x @ w_ih.T + (b_ih + b_hh)
        h = c = x.new_zeros(x.shape[1], w_hh.shape[1])
        outputs = []
        for t in range(x.shape[0]):
            i, f, g, o = (preact[t] + h @ w_hh.T).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)

    return torch.compile(forward)


class Loop(nn.Module):
    """A compiled loop over the parameters of an nn.LSTM, with a module's face."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm, self.run = lstm, step_loop(lstm)

    def forward(self, x: Tensor) -> Any:
        return self.run(x)


def contenders(shape: Shape, dtype: torch.dtype, device: str, loop: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    theirs = nn.LSTM(shape.I, shape.H)
    found: dict[str, nn.Module] = {"nn.LSTM": theirs}
    ours = fastlstm.LSTM(shape.I, shape.H, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    found["fastlstm"] = ours
    if loop:
        copy = nn.LSTM(shape.I, shape.H)
        copy.load_state_dict(theirs.state_dict())
        found["torch.compile"] = Loop(copy)
    return {name: module.to(device, dtype) for name, module in found.items()}


def check(modules: Mapping[str, nn.Module], x: Tensor, doutput: Tensor, limit: float) -> dict[str, float]:
    """Largest error of output and gradients against float64, of the largest value.

    Ours may be three times nn.LSTM's own, or `limit`; beyond that this raises.
    """
    exact = nn.LSTM(modules["nn.LSTM"].input_size, modules["nn.LSTM"].hidden_size).double().to(x.device)
    exact.load_state_dict(modules["nn.LSTM"].state_dict())

    def results(module: nn.Module, x: Tensor, doutput: Tensor) -> list[Tensor]:
        output = module(x)[0]
        gradients = torch.autograd.grad(output, list(module.parameters()), doutput)
        return [a.detach().double() for a in (output, *gradients)]

    want = results(exact, x.double(), doutput.double())
    errors = {}
    for name, module in modules.items():
        got = results(module, x, doutput)
        errors[name] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))
    limit = max(limit, 3 * errors["nn.LSTM"])
    if not errors["fastlstm"] <= limit:  # NaN is an error too
        raise AssertionError(f"fastlstm is {errors['fastlstm']:.1e} from float64, allowed {limit:.0e}")
    return errors


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def medians(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Seconds a call, in interleaved rounds."""
    flush = torch.empty(256 * 2**20 if device == "cuda" else 1, dtype=torch.int8, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for n in range(rounds + 3):  # three to warm up
        for name, run in runs.items():
            flush.zero_()
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
            else:
                before = time.perf_counter()
                run()
                seconds = time.perf_counter() - before
            if n >= 3:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shape: Shape, name: str, device: str, rounds: int, loop: bool) -> Iterator[dict[str, Any]]:
    dtype, setting, limit = PRECISIONS[name]
    rnn: Any = torch.backends.cudnn.rnn
    rnn.fp32_precision = setting
    torch.backends.cuda.matmul.fp32_precision = setting
    modules = contenders(shape, dtype, device, loop)
    torch.manual_seed(1)
    x = torch.randn(shape.T, shape.B, shape.I).to(device, dtype)
    doutput = torch.randn(shape.T, shape.B, shape.H).to(device, dtype)
    errors = check(modules, x, doutput, limit)
    for mode in MODES:
        runs = {
            key: inference(module, x) if mode == "inference" else training(module, x, doutput)
            for key, module in modules.items()
        }
        ways = {"eager": runs}
        if device == "cuda":
            ways["graph"] = {key: graphed(run) for key, run in runs.items()}
        for way, these in ways.items():
            seconds = medians(these, rounds, device)
            yield {
                "name": str(shape), "shape": asdict(shape), "precision": name, "mode": mode, "way": way,
                "seconds": seconds, "errors": errors, "microseconds_a_step": 1e6 * seconds["fastlstm"] / shape.T,
                "ratio": seconds["nn.LSTM"] / seconds["fastlstm"],
            }  # fmt: skip


def command(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT)
    return {"command": " ".join(arguments), "status": done.returncode, "output": (done.stdout + done.stderr)[-4000:]}


def chart(report: dict[str, Any]) -> Figure:
    """How many times as long nn.LSTM takes, from graphs where there are any."""
    way = "graph" if any(row["way"] == "graph" for row in report["results"]) else "eager"
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, mode in zip(panels, MODES, strict=True):
        rows = [row for row in report["results"] if row["mode"] == mode and row["way"] == way]
        draw(axes, rows)
        axes.set_title(f"{mode}, {way}", loc="left")
    figure.suptitle(f"Speed relative to nn.LSTM, same precision: {report['device']}")
    return figure


def draw(axes: Axes, rows: list[dict[str, Any]]) -> None:
    labels = [f"{row['name']} {row['precision']}" for row in rows]
    axes.barh(range(len(rows)), [row["ratio"] for row in rows])
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no new shape is begun (5)")
    parser.add_argument("--rounds", type=int, default=31, help="of each measurement (31)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the two files")
    parser.add_argument("--dry-run", action="store_true", help="tiny layers on the CPU, in Triton's interpreter")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1, got {options.rounds}")
    if options.dry_run and not INTERPRET:
        parser.error("argument --dry-run: needs TRITON_INTERPRET=1 in the environment")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --dry-run needs none")
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    began, device = time.monotonic(), "cpu" if options.dry_run else "cuda"
    report: dict[str, Any] = {
        "device": "none (dry run)" if options.dry_run else torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: machine.version(name) for name in ("fastlstm", "torch", "triton")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "rounds": options.rounds,
        "results": [],
        "commands": [],
    }  # fmt: skip
    if not options.dry_run:
        report["commands"].append(command("pytest", "-q", "tests/test_triton.py"))
    for n, shape in enumerate(TINY if options.dry_run else SHAPES):
        for name in ("ieee", "tf32") if options.dry_run else PRECISIONS:
            if (time.monotonic() - began) / 60 < options.minutes:
                loop = n == 0 and not options.dry_run  # of the row-LSTM alone: to compile it takes a minute
                for row in measure(shape, name, device, options.rounds, loop):
                    report["results"].append(row)
                    took = row["microseconds_a_step"]
                    print(f"{row['name']:24} {name:5} {row['mode']:10} {row['way']:6} {took:9.2f} us a step,"
                          f" {row['ratio']:6.2f} times nn.LSTM", flush=True)  # fmt: skip
    if not options.dry_run:
        out = str(options.out / "gpu-row-lstm")
        report["commands"].append(command("fastlstm.train", "--device", "cuda", "--compare", "--out", out))
    options.out.mkdir(parents=True, exist_ok=True)
    name = "gpu-dry-run" if options.dry_run else f"{machine.slug(report['device'])}-{report['date']}"
    text = json.dumps(report, indent=1) + "\n"
    print(replaced(options.out / f"{name}.json", lambda path: path.write_text(text)))
    print(replaced(options.out / f"{name}.png", lambda path: chart(report).savefig(path, dpi=150)))
    failed = [entry["command"] for entry in report["commands"] if entry["status"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their output is in the JSON file")


if __name__ == "__main__":
    main()
