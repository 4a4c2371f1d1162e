"""fastlstm.LSTM on a CPU beside torch.nn.LSTM: some shapes of the grid, in three minutes on two cores.

pytest benchmarks/ --benchmark-only

`benchmarks.clock` does the timing: contenders interleaved, on a settled machine. pytest-benchmark only keeps the times,
and conftest.py prints the table. `make bench` measures the whole grid.
"""

import functools
import statistics
from dataclasses import asdict

import pytest
import torch

from benchmarks.clock import REPLAY, Contender, interleaved, ratio_of, thread_counts
from benchmarks.contest import Contest
from benchmarks.peak import fma_peak
from benchmarks.shapes import MODES, SOME, Shape

ROUNDS, SECONDS = 21, 3.0  # of a shape and mode: rounds, unless they take longer


@functools.lru_cache(maxsize=1)
def checked(shape: Shape) -> Contest:
    contest = Contest(shape)
    contest.check()
    return contest


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SOME, ids=str)
def test_lstm(benchmark, shape, mode):
    threads, contest = torch.get_num_threads(), checked(shape)
    theirs = {f"nn.LSTM {n}": Contender(contest.run(contest.baseline, mode), n) for n in thread_counts(threads)}
    contenders = {**theirs, "fastlstm": Contender(contest.run(contest.ours, mode), threads)}
    times = interleaved(contenders, ROUNDS, limit=SECONDS)
    best = min(theirs, key=lambda name: statistics.median(times[name]))  # the thread count that it is faster with
    REPLAY.report(benchmark, times["fastlstm"])
    seconds, peak = statistics.median(times["fastlstm"]), fma_peak(threads)
    gflops = shape.flops(mode) / seconds / 1e9
    benchmark.extra_info |= {
        "ratio to nn.LSTM": asdict(ratio_of(times[best], times["fastlstm"])),
        "name": str(shape),
        "mode": mode,
        "seconds": seconds,
        "nn.LSTM seconds": statistics.median(times[best]),
        "threads": threads,
        "nn.LSTM threads": theirs[best].threads,
        "GFLOP/s": gflops,
        "fraction of peak": gflops / peak,
    }
