"""Times taken side by side: rounds in which every contender runs once, and the ratio of lower quartiles of both sides.

What disturbs a sample only adds to it. So the quarter of the rounds that was disturbed least says more of a side than
half of them: where a machine loses its cores in half of the rounds, its quartile is still that of a quiet one. On two
cores of a Zen 4 in a virtual machine, ratios of quartiles scattered by 5.4 % from each seventeen rounds to the next,
ratios of medians by 6.8 %, and of the least times, each of one lucky round, by 5.9 %.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Run = Callable[[], object]
Name = TypeVar("Name")

WRITTEN = 4 * 2**20  # bytes: more than a core's caches hold
OTHER_DATA = np.zeros(WRITTEN // 4, np.float32)
QUARTILE = 0.25  # of the rounds
SAMPLE = 0.005  # seconds: a shorter call is repeated until a sample lasts this long
FEWEST = 5  # rounds, from which a quartile tells something
SETTLE = 0.010  # seconds untimed before each sample: torch's idle threads spin on for 8 ms after a call
LONG = 0.2  # seconds: a call that takes longer hardly notices the threads of the one before
SCATTER = 1.25  # the highest bound of an interval beside its lowest, above which a ratio says nothing


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(run: Run, calls: int) -> float:
    """Return the seconds that a call takes on the CPU."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def seconds_between_writes(run: Run, calls: int) -> float:
    """Return the seconds of a call before which `WRITTEN` bytes have been written, as other layers of a model do."""
    total = 0.0
    for _ in range(calls):
        np.add(OTHER_DATA, 1, out=OTHER_DATA)
        total += seconds_of(run, 1)
    return total / calls


def in_turns(samples: Mapping[Name, Callable[[], float]], rounds: int, limit: float) -> dict[Name, list[float]]:
    """Take a sample of each in each round, and return what they gave. Every second round has the opposite order.

    After `limit` seconds no round begins except the first `FEWEST`.
    """
    times: dict[Name, list[float]] = {name: [] for name in samples}
    order, begin = list(samples), time.perf_counter()
    for n in range(rounds):
        if n >= FEWEST and time.perf_counter() - begin > limit:
            break
        for name in order if n % 2 == 0 else reversed(order):
            times[name].append(samples[name]())
    return times


def context_of(run: Run) -> AbstractContextManager[object]:
    return getattr(run, "within", nullcontext)()  # type: ignore[no-any-return]


def sampled(run: Run, threads: int, is_cold: bool) -> Callable[[], float]:
    """Return what takes the seconds of a call on so many threads, `SETTLE` seconds after what ran before.

    A call that runs in another process has a `sample` of its own. One that needs a context has it as `within`.
    """
    if sample_elsewhere := getattr(run, "sample", None):
        return sample_elsewhere  # type: ignore[no-any-return]
    clock = seconds_between_writes if is_cold else seconds_of
    with num_threads(threads), context_of(run):
        run()  # compiles, packs, fills caches
        once = min(seconds_of(run, 1) for _ in range(3))
    calls = max(1, math.ceil(SAMPLE / once))
    untimed = math.ceil(SETTLE / once) if once < LONG else 0

    def sample() -> float:
        with num_threads(threads), context_of(run):
            if untimed:
                seconds_of(run, untimed)
            return clock(run, calls)

    return sample


def thread_counts(threads: int | None = None) -> list[int]:
    """Return the thread count that is asked for, or else one and torch's number of threads."""
    return [threads] if threads else sorted({1, torch.get_num_threads()})


def times_as_fast(ratio: Mapping[str, float]) -> float:
    """Return the ratio of a row. In rows of commits before its statistic was the quartile it is that of medians."""
    return ratio["quartile"] if "quartile" in ratio else ratio["median"]


@dataclass(frozen=True)
class Ratio:
    """How many times as long one takes as another: the ratio of their lower quartiles, and its 95 % interval."""

    quartile: float
    low: float
    high: float

    @property
    def is_noisy(self) -> bool:
        """Whether the rounds scatter so much that the ratio says nothing."""
        return self.high > SCATTER * self.low


def ratio_of(theirs: list[float], ours: list[float], resamples: int = 4000) -> Ratio:
    """Return the ratio of the lower quartiles of what both took in the same rounds.

    The interval is that of a bootstrap. It draws rounds, each with both of its times, so that a drift of the machine
    cancels.
    """
    times = np.array([theirs, ours])
    draws = np.random.default_rng(0).integers(len(ours), size=(resamples, len(ours)))
    ratio = float(np.divide(*np.quantile(times, QUARTILE, axis=1)))
    low, high = np.quantile(np.divide(*np.quantile(times[:, draws], QUARTILE, axis=2)), (0.025, 0.975))
    return Ratio(ratio, min(float(low), ratio), max(float(high), ratio))


@dataclass(frozen=True)
class Side:
    """What one side took in each round, with the thread count that was faster for it."""

    times: list[float]
    threads: int

    @property
    def seconds(self) -> float:
        """The lower quartile."""
        return float(np.quantile(self.times, QUARTILE))

    def to(self, other: "Side") -> Ratio:
        """Return how many times as fast this side is as the other."""
        return ratio_of(other.times, self.times)


def compare(
    runs: Mapping[str, Run | Mapping[int, Run]],
    rounds: int,
    counts: Sequence[int] = (),
    limit: float = math.inf,
    is_cold: bool = False,
) -> dict[str, Side]:
    """Time each on every thread count in every round, and return of each the faster thread count.

    Args:
        runs: what runs by its name, or by its thread counts where each needs a call of its own.
        rounds: how many, unless they take longer than `limit` seconds.
        counts: the thread counts; one and torch's number of threads unless they are given.
        is_cold: whether a call finds caches that other data has filled.
    """
    counts = counts or thread_counts()
    by_count = {name: run if isinstance(run, Mapping) else dict.fromkeys(counts, run) for name, run in runs.items()}
    samples = {(name, n): sampled(run, n, is_cold) for name, of in by_count.items() for n, run in of.items()}
    sides = [(name, Side(times, n)) for (name, n), times in in_turns(samples, rounds, limit).items()]
    return {name: min((side for of, side in sides if of == name), key=lambda side: side.seconds) for name in runs}
