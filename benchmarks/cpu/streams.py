"""The latency of single steps of an LSTM, one row or a few at a time: fastlstm's streams beside what else there is.

python -m benchmarks.cpu.streams [--batch 1] [--threads 1] [--calls 20000]

Each contender runs in a process of its own, and blocks of its calls alternate with blocks of the others'. ONNX Runtime
takes part if it is installed. Its threads do not spin, and neither do those of a contender that waits.
"""

import contextlib
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

import fastlstm
from benchmarks.runtimes.with_onnx import installed, onnx_int8, onnx_step, onnxruntime_session
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm.commands import positive

SIZES = [(40, 128), (128, 128), (512, 512), (1024, 1024)]  # I, H
CONTENDERS = ("stream", "stream.step", "int8 stream", "step", "nn.LSTM", "onnxruntime", "onnxruntime int8")
BLOCK = 500  # calls
SPAWN = multiprocessing.get_context("spawn")
_call: Callable[[], object]


def onnxruntime_call(model: bytes, x: torch.Tensor, H: int, threads: int) -> Callable[[], object]:
    session = onnxruntime_session(model, threads, spinning=False)
    feed = {"x": x[None].numpy(), **{name: np.zeros((1, x.shape[0], H), np.float32) for name in "hc"}}

    def call() -> None:
        feed["h"], feed["c"] = session.run(None, feed)

    return call


def contender(name: str, B: int, I: int, H: int, threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    lstm, x = nn.LSTM(I, H), torch.randn(B, I)
    ours, state = fastlstm.LSTM.from_torch(lstm), (torch.zeros(1, B, H), torch.zeros(1, B, H))
    if name.startswith("onnxruntime"):
        model = onnx_step(lstm, B)
        return onnxruntime_call(onnx_int8(model) if name.endswith("int8") else model, x, H, threads)
    if name.endswith("stream"):
        module: Any = fastlstm.quantize(nn.Sequential(ours))[0] if name.startswith("int8") else ours
        stream = module.stream(B)
        return lambda: stream(x)

    step = ours.stream(B).step if name == "stream.step" else ours.step

    def call() -> None:
        nonlocal state
        with torch.no_grad():
            _, state = lstm(x[None], state) if name == "nn.LSTM" else step(x, state)

    return call


def begin(*arguments: Any) -> None:
    """Make this process that of a contender."""
    global _call
    _call = contender(*arguments)


def block() -> list[float]:
    """Return the seconds of each call of a block, in the process of a contender."""
    times = [time.perf_counter()]
    for _ in range(BLOCK):
        _call()
        times.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(times)]


def measure(names: list[str], B: int, I: int, H: int, threads: int, calls: int) -> dict[str, list[float]]:
    """Return the seconds of each call of each contender."""
    with contextlib.ExitStack() as stack:
        pools = {name: ProcessPoolExecutor(1, SPAWN, begin, (name, B, I, H, threads)) for name in names}
        for pool in pools.values():
            stack.enter_context(pool).submit(block).result()  # compiles, packs and fills caches
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(max(1, calls // BLOCK)):
            for name, pool in pools.items():
                times[name] += pool.submit(block).result()
    return times


def rows(options: Options, names: list[str]) -> Iterator[list[str]]:
    for I, H in SIZES:
        times = measure(names, options.batch, I, H, options.threads, options.calls)
        us = [[of * 1e6 for of in (statistics.median(each), np.quantile(each, 0.99))] for each in times.values()]
        yield [f"{I}, {H}", *(f"{median:.1f} ({late:.1f})" for median, late in us)]


if __name__ == "__main__":
    arguments = parser("cpu.streams", __doc__, rounds=None, threads=False)
    arguments.add_argument("--batch", type=positive, default=1, help="rows of a step (1)")
    arguments.add_argument("--threads", type=positive, default=1, help="of each contender (1)")
    arguments.add_argument("--calls", type=positive, default=20000, help="of each contender at each size (20000)")
    options = arguments.parse_args()
    names = [name for name in CONTENDERS if "onnxruntime" in installed() or not name.startswith("onnxruntime")]
    print(f"us a step of {options.batch} rows on {options.threads} threads: the median, and the 99th percentile")
    print_table(["I, H", *names], rows(options, names))
