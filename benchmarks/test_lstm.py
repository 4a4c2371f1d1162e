"""fastlstm.LSTM on a CPU beside torch.nn.LSTM, grouped by shape and mode.

pytest benchmarks/ --benchmark-only
"""

import functools
import statistics
from dataclasses import asdict

import pytest
import torch

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
