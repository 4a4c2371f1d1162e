"""What fastlstm gains over torch: the brief cases of the tables on a CPU, and layers on a GPU where there is one.

pytest benchmarks/ --benchmark-only

`benchmarks.shared.clock` does the timing: both sides in turns, on a settled machine. On a GPU `benchmarks.gpu.layers`
does it. Every row is visited twice, with modules and tensors made anew. So its interval also holds what changes
from minute to minute, and from one place in memory to another. A row without a result, since its rounds scatter or
other processes worked beside a visit, gets a third visit. pytest-benchmark only keeps the times, and conftest.py
prints the table. `python -m benchmarks` measures all cases, and `python -m benchmarks.gpu` a GPU.
"""

import functools
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks.cpu import tables
from benchmarks.gpu import layers
from benchmarks.shared import machine
from benchmarks.shared.case import OURS, Case, Runs, Skip
from benchmarks.shared.clock import Side
from benchmarks.shared.shapes import Shape
from fastlstm.backends import dispatch

VISITS = 2  # of a row, between which all others are visited; a row that has no result then is visited once more
ROUNDS, SECONDS = 10, 1.5  # of a visit: rounds, unless they take longer
THEIRS = "torch", "float32", "a loop in PyTorch"  # the rivals, of which a row shows its first
Visit = tuple[tuple[Side, Side], bool]  # ours and theirs, and whether other processes worked


class Replay:
    """A clock for pytest-benchmark that goes on by what has been measured, and by nothing else."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def report(self, benchmark, seconds: list[float]) -> None:
        """Have the fixture `benchmark`, whose timer this is, report `seconds`."""
        left = iter(seconds)

        def call() -> None:
            self.now += next(left)

        benchmark.pedantic(call, rounds=len(seconds))


REPLAY = Replay()


class OnGPU(Case):
    """A layer whose calls are timed by events of the device."""

    def sides(self, runs: Runs, rounds: int, limit: float = 0.0) -> dict[str, Side]:
        calls: Any = runs
        return layers.times(calls, way="eager", rounds=rounds)


def on_gpu(shape: Shape, mode: str) -> Runs:
    reason = dispatch.module("triton").supports(torch.device(layers.DEVICE), torch.bfloat16)
    if reason is not None:
        raise Skip(reason)  # before anything is computed
    return {**layers.contest_of(shape, "bf16").runs(mode)}


CASES = [case for case in tables.CASES if case.is_brief]
if torch.cuda.is_available():
    group = f"{torch.cuda.get_device_name()}, bf16"
    CASES += [OnGPU(group, f"GPU {shape}", functools.partial(on_gpu, shape), tolerance=None) for shape in layers.SHAPES]
ROWS = [pytest.param(case, mode, [], id=f"{case.name}-{mode}") for case in CASES for mode in case.modes]


def result(visits: list[Visit]) -> tuple[Side, Side, bool]:
    """Return ours and theirs of all visits beside which no other process worked, or of all if others always did, each
    with the thread count of its last visit, and whether they give no result.
    """
    quiet = [sides for sides, is_busy in visits if not is_busy]
    every = quiet or [sides for sides, _ in visits]
    ours, theirs = (Side([seconds for side in of for seconds in side.times], of[-1].threads) for of in zip(*every))
    return ours, theirs, len(quiet) < VISITS or ours.to(theirs).is_noisy


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(("case", "mode", "visits"), ROWS)
@pytest.mark.parametrize("visit", range(1, VISITS + 2))  # the lowest decorator's parameter changes least often
def test_speed(benchmark, case: Case, mode: str, visits: list[Visit], visit: int):
    """Visit a row, and keep what conftest.py prints and `benchmarks.change` reads. A row's last visit counts."""
    if visit > VISITS and visits and not result(visits)[2]:
        pytest.skip("the row has a result")
    try:
        runs = case.runs(mode)
    except Skip as reason:
        pytest.skip(str(reason))
    rival = next(name for name in THEIRS if name in runs)
    others = machine.Others()
    sides = case.sides({OURS: runs[OURS], rival: runs[rival]}, ROUNDS, SECONDS)
    visits.append(((sides[OURS], sides[rival]), others.processors() > machine.BUSY))
    ours, theirs, is_noisy = result(visits)
    REPLAY.report(benchmark, ours.times)
    benchmark.extra_info |= {"group": case.group, "name": case.name, "mode": mode, "note": case.note}
    benchmark.extra_info |= {"ratio to nn.LSTM": asdict(ours.to(theirs)), "noisy": is_noisy}
    benchmark.extra_info |= {"seconds": ours.seconds, "threads": ours.threads}
    benchmark.extra_info |= {"nn.LSTM seconds": theirs.seconds, "nn.LSTM threads": theirs.threads}
