"""fastlstm.LSTM beside torch.nn.LSTM, grouped by device, shape and mode.

pytest benchmarks/ --benchmark-only
"""

import functools
import statistics
from dataclasses import asdict

import pytest
import torch

from benchmarks import gpu_layers
from benchmarks.clock import Contender, fastest, interleaved, num_threads, ratio_of, thread_counts
from benchmarks.contest import Contest
from benchmarks.peak import fma_peak
from benchmarks.shapes import GRID, MODES, Shape

PAIRS = 11  # enough to see 10 %; benchmarks.run takes more and gives the interval its due


@functools.lru_cache(maxsize=1)
def checked(shape: Shape) -> Contest:
    contest = Contest(shape)
    contest.check()
    return contest


@functools.lru_cache(maxsize=1)
def baseline(shape: Shape, mode: str, threads: int) -> Contender:
    """nn.LSTM with the thread count it is faster with."""
    contest = checked(shape)
    return fastest(dict.fromkeys(thread_counts(threads), contest.run(contest.baseline, mode)))


@pytest.mark.parametrize("implementation", ["nn.LSTM", "fastlstm"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_lstm(benchmark, shape, mode, implementation):
    threads = torch.get_num_threads()
    contest = checked(shape)
    theirs, ours = baseline(shape, mode, threads), Contender(contest.run(contest.ours, mode), threads)
    contender = theirs if implementation == "nn.LSTM" else ours
    benchmark.group = f"cpu {shape} {mode}"
    with num_threads(contender.threads):
        benchmark(contender.run)
    times = interleaved({"theirs": theirs, "contender": contender}, PAIRS)
    peak = fma_peak(threads)
    gflops = shape.flops(mode) / statistics.median(times["contender"]) / 1e9
    benchmark.extra_info |= {
        "shape": asdict(shape),
        "mode": mode,
        "threads": contender.threads,
        "GFLOP/s": gflops,
        "FMA peak GFLOP/s": peak,
        "fraction of peak": gflops / peak,
        "ratio to nn.LSTM": ratio_of(times["theirs"], times["contender"]).median,
    }


@functools.lru_cache(maxsize=1)
def checked_on_a_gpu(shape: Shape, precision: str) -> gpu_layers.Bench:
    bench = gpu_layers.Bench(shape, precision, "cuda", [])
    bench.check()
    return bench


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("implementation", ["nn.LSTM", "fastlstm"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", gpu_layers.PRECISIONS)
@pytest.mark.parametrize("shape", gpu_layers.SHAPES, ids=str)
def test_lstm_on_a_gpu(benchmark, shape, precision, mode, implementation):
    """Each call waits for the device; the ratio is of CUDA events."""
    gpu_layers.set_precision(precision)
    bench = checked_on_a_gpu(shape, precision)
    runs = {name: bench.run(name, mode) for name in bench.modules}

    def call() -> None:
        runs[implementation]()
        torch.cuda.synchronize()

    benchmark.group = f"{torch.cuda.get_device_name()} {shape} {mode} {precision}"
    benchmark(call)
    row = bench.row(mode, "eager", runs, PAIRS)
    benchmark.extra_info |= {key: row[key] for key in ("shape", "mode", "precision", "errors", "seconds", "ratios")}
