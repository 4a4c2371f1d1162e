"""One LSTM layer with int8 weights against our float32, and ONNX Runtime's int8 where it is installed, on one thread.

python -m benchmarks.cpu.int8 [--rounds 41] [--shapes 1,128,128 16,256,256]
"""

import statistics
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

import fastlstm
from benchmarks.runtimes.with_onnx import installed, onnx_int8, onnx_layers, onnxruntime_run
from benchmarks.shared.calls import check
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import Shape
from benchmarks.shared.tables import Options, parser, print_table

SHAPES = "1,128,128", "1,512,512", "1,1024,1024", "16,256,256", "64,256,256", "128,28,128"
WORK = 1e9  # multiply-adds of a call, which say how many steps it has
MOST_STEPS = 1000


def contenders(B: int, I: int, H: int) -> tuple[int, dict[str, Run]]:
    """Return the number of steps of a call, and what runs it."""
    torch.manual_seed(0)
    T = max(4, min(MOST_STEPS, round(WORK / (B * 4 * H * (I + H)))))
    theirs, x = nn.LSTM(I, H), torch.randn(T, B, I)
    ours = fastlstm.LSTM.from_torch(theirs)
    modules = {"nn.LSTM": theirs, "float32": ours, "int8": fastlstm.quantize(deepcopy(ours))}
    modules["int16"] = fastlstm.quantize(deepcopy(ours), "int16")
    for module in modules.values():
        check(module(x)[0], ours(x)[0], 2e-2)
    runs: dict[str, Run] = {name: torch.no_grad()(lambda m=module: m(x)) for name, module in modules.items()}
    if "onnxruntime" in installed():
        runs["ONNX Runtime int8"] = onnxruntime_run(onnx_int8(onnx_layers(theirs, Shape(T, B, I, H))), x, 1)
    return T, runs


def rows(options: Options) -> Iterator[list[str]]:
    for text in options.shapes:
        T, runs = contenders(*map(int, text.split(",")))
        sides = compare(runs, options.rounds, threads=1)
        for name, side in sides.items():
            us = [f"{of(side.times) / T * 1e6:.2f}" for of in (min, statistics.median)]
            yield [f"{text}, T {T}", name, *us, str(side.to(sides["float32"]))]


if __name__ == "__main__":
    arguments = parser("cpu.int8", __doc__, rounds=41, threads=False)
    arguments.add_argument("--shapes", nargs="+", default=SHAPES)
    header = ["B, I, H", "what", "us a step, least", "median", "speed relative to float32"]
    print_table(header, rows(arguments.parse_args()))
