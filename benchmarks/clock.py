"""Times taken side by side: rounds in which every contender runs once, medians, and the ratio with its interval."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

SAMPLE = 0.005  # seconds: a shorter call is repeated until a sample lasts this long
FEWEST = 5  # rounds, from which a median tells something
SETTLE = 0.010  # seconds untimed before each sample: torch's idle threads spin on for 8 ms after a call


@dataclass(frozen=True)
class Contender:
    run: Callable[[], object]
    threads: int  # torch's thread count while it runs


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(run: Callable[[], object], calls: int, device: str = "cpu") -> float:
    """Seconds a call. The one place that knows how a device's time is taken."""
    if torch.device(device).type != "cpu":
        raise ValueError(f"device must be cpu, the only one with a clock here, got {device}")
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def interleaved(
    contenders: Mapping[str, Contender], rounds: int, settle: float = SETTLE, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds a call of every contender in each of `rounds` rounds; every second round runs in the opposite order.
    After `limit` seconds no round begins but the first `FEWEST`.
    """
    calls, untimed = {}, {}
    for name, contender in contenders.items():
        with num_threads(contender.threads):
            contender.run()  # compiles, packs, fills caches
            once = min(seconds_of(contender.run, 1) for _ in range(3))
        calls[name], untimed[name] = (max(1, math.ceil(least / once)) for least in (SAMPLE, settle))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, begin = list(contenders), time.perf_counter()
    for n in range(rounds):
        if n >= FEWEST and time.perf_counter() - begin > limit:
            break
        for name in order if n % 2 == 0 else reversed(order):
            with num_threads(contenders[name].threads):
                seconds_of(contenders[name].run, untimed[name])
                times[name].append(seconds_of(contenders[name].run, calls[name]))
    return times


class Replay:
    """A clock for pytest-benchmark that goes on by what has been measured, and by nothing else."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def report(self, benchmark: Any, seconds: list[float]) -> None:
        """Have the fixture `benchmark`, whose timer this is, report `seconds`."""
        left = iter(seconds)

        def call() -> None:
            self.now += next(left)

        benchmark.pedantic(call, rounds=len(seconds))


REPLAY = Replay()


def thread_counts(threads: int) -> list[int]:
    return sorted({1, threads})


def fastest(runs: Mapping[int, Callable[[], object]], rounds: int = 7, settle: float = SETTLE) -> Contender:
    """Of the same work prepared for several thread counts, the one with the lowest median."""
    contenders = {str(threads): Contender(run, threads) for threads, run in runs.items()}
    if len(contenders) > 1:
        times = interleaved(contenders, rounds, settle)
        return contenders[min(times, key=lambda name: statistics.median(times[name]))]
    return next(iter(contenders.values()))


@dataclass(frozen=True)
class Ratio:
    """How many times as long `theirs` takes as `ours`: the median over the pairs, and its 95 % interval."""

    median: float
    low: float
    high: float


def ratio_of(theirs: list[float], ours: list[float], resamples: int = 4000) -> Ratio:
    """Ratios within a pair, so that a drift of the machine cancels; the interval by bootstrap over the pairs."""
    ratios = np.array(theirs) / np.array(ours)
    draws = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high))
