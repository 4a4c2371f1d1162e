"""The ratios of the benchmarks: each lies in its interval, and what a disturbed machine gave is no result."""

import multiprocessing
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.shared import clock, machine
from benchmarks.shared.clock import ratio_of

ROUNDS, SEEDS = 21, range(10)


def slowed(draw, share):
    """The factors (2, ROUNDS) of samples of which a share takes twice as long, others on each side."""
    factors = np.where(np.arange(ROUNDS) < round(share * ROUNDS), 2, 1)
    return draw.permuted([factors, factors], axis=1)


# by name, what slows the samples (2, ROUNDS) of both sides, and whether the ratio is lost
DISTURBED = {
    "nothing": (lambda draw: np.ones((2, ROUNDS)), False),
    "a drift of the machine": (lambda draw: np.linspace([1, 1], [2, 2], ROUNDS, axis=1), False),
    "a machine of two speeds": (lambda draw: np.tile(draw.choice([1, 3], ROUNDS), (2, 1)), False),
    "a sample in ten": (lambda draw: slowed(draw, 0.1), False),
    "a third of the samples": (lambda draw: slowed(draw, 1 / 3), False),
    "half of the samples": (lambda draw: slowed(draw, 0.5), False),
    "half of one side's samples": (lambda draw: slowed(draw, 0.5) ** [[1], [0]], False),
    "three quarters of the samples": (lambda draw: slowed(draw, 0.75), True),
    "three quarters of one side's samples": (lambda draw: slowed(draw, 0.75) ** [[1], [0]], True),
    "every sample by another factor": (lambda draw: draw.uniform(1, 4, (2, ROUNDS)), True),
}


def disturbed(kind, seed):
    """The ratio of rounds in which torch would take twice as long but for 1 % and what slows them."""
    draw = np.random.default_rng(seed)
    return ratio_of(*([[2], [1]] * draw.normal(1, 0.01, (2, ROUNDS)) * DISTURBED[kind][0](draw)))


@pytest.mark.parametrize("kind", DISTURBED)
def test_what_is_printed_is_true_and_lies_in_its_interval(kind):
    found = [disturbed(kind, seed) for seed in SEEDS]
    assert all(ratio.low <= ratio.quartile <= ratio.high for ratio in found)
    assert all(ratio.low / 1.02 <= 2 <= 1.02 * ratio.high for ratio in found if not ratio.is_noisy)


@pytest.mark.parametrize(("kind", "lost"), [(kind, lost) for kind, (_, lost) in DISTURBED.items()])
def test_rounds_that_scatter_give_no_result(kind, lost):
    noisy = sum(disturbed(kind, seed).is_noisy for seed in SEEDS)
    assert noisy >= 0.9 * len(SEEDS) if lost else noisy == 0


def test_the_ratio_is_that_of_the_lower_quartiles():
    theirs, ours = [1.0, 9.0, 3.0, 9.0, 4.0], [2.0, 1.0, 7.0, 9.0, 9.0]
    assert ratio_of(theirs, ours).quartile == 3.0 / 2.0
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio = ratio_of([1.5 * value for value in drifting], drifting)
    assert (ratio.low, ratio.quartile, ratio.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(("one", "two", "threads"), [(3.0, 2.0, 2), (2.0, 3.0, 1)])
def test_of_each_side_the_thread_count_counts_that_was_faster_in_the_rounds(monkeypatch, one, two, threads):
    def in_turns(samples, rounds, limit):
        seconds = {("torch", 1): one, ("torch", 2): two, ("ours", 1): 1.0, ("ours", 2): 1.0}
        return {key: [seconds[key]] * rounds for key in samples}

    monkeypatch.setattr(clock, "in_turns", in_turns)
    sides = clock.compare({"torch": int, "ours": int}, 3, counts=[1, 2])
    assert (sides["torch"].threads, sides["torch"].seconds, sides["ours"].to(sides["torch"]).quartile) == (
        threads,
        2,
        2,
    )


@pytest.mark.skipif(not machine.STAT.exists(), reason="the system does not say what other processes do")
def test_the_work_of_another_process_is_seen():
    others = machine.Others()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert others.processors() > machine.BUSY


def test_the_work_of_this_process_is_not_that_of_others(monkeypatch, tmp_path):
    """Of 3 more seconds of all processes, in 2 seconds, this one had 1.4: others kept 0.8 processors busy."""
    ticks, stat = machine.os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    monkeypatch.setattr(machine, "STAT", stat)
    monkeypatch.setattr(machine.time, "process_time", iter([1.0, 2.4]).__next__)
    monkeypatch.setattr(machine.time, "perf_counter", iter([10.0, 12.0]).__next__)
    stat.write_text(f"cpu  {5 * ticks} 0 0 {99 * ticks} {ticks} 0 0 0 0 0\n")
    others = machine.Others()
    stat.write_text(f"cpu  {6 * ticks} {ticks} 0 {109 * ticks} {2 * ticks} 0 0 {ticks} 0 0\n")
    assert others.processors() == pytest.approx(0.8)


def work():
    while True:
        pass


@pytest.mark.skipif(not machine.STAT.exists(), reason="the system does not say what other processes do")
def test_the_work_of_a_process_of_this_one_is_not_that_of_others(monkeypatch, tmp_path):
    """All processes stand still by the system's count, but for what a child of this one is counted to have done."""
    ticks, stat = machine.os.sysconf("SC_CLK_TCK"), tmp_path / "stat"
    child = multiprocessing.get_context("spawn").Process(target=work, daemon=True)
    child.start()
    try:
        monkeypatch.setattr(machine, "STAT", stat)
        stat.write_text(f"cpu  {1000 * ticks} 0 0 0 0 0 0 0 0 0\n")
        others = machine.Others()
        time.sleep(2)
        assert others.processors() < 0  # more than nothing has been taken off
    finally:
        child.kill()
