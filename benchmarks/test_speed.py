"""What fastlstm gains over torch: the brief cases of the tables on a CPU, and layers on a GPU where there is one.

pytest benchmarks/ --benchmark-only

`benchmarks.shared.clock` does the timing: both sides in turns, on a settled machine. On a GPU `benchmarks.gpu.layers`
does it. Every row is visited twice, with modules and tensors made anew. So its interval also holds what changes
from minute to minute, and from one place in memory to another. A row without a result, since its rounds scatter or
other processes worked beside a visit, gets a third visit. pytest-benchmark only keeps the times, and conftest.py
prints the table. `python -m benchmarks` measures all cases, and `python -m benchmarks.gpu` a GPU.
"""

import functools
from collections import defaultdict
from dataclasses import asdict, dataclass, field
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


@dataclass
class Row:
    """What the visits of a row have measured so far."""

    quiet: list[dict[str, Side]] = field(default_factory=list)  # visits beside which no other process worked
    busy: list[dict[str, Side]] = field(default_factory=list)

    def side(self, name: str) -> Side:
        """Return the times of all quiet visits, or of all if none was, with the thread count of the last."""
        visits = self.quiet or self.busy
        return Side([seconds for visit in visits for seconds in visit[name].times], visits[-1][name].threads)

    @property
    def is_noisy(self) -> bool:
        return len(self.quiet) < VISITS or self.side("fastlstm").to(self.side("torch")).is_noisy


ROWS: defaultdict[tuple[str, str, str], Row] = defaultdict(Row)


def record(benchmark, case: Case, mode: str, row: Row) -> None:
    """Keep what conftest.py prints and `benchmarks.change` reads, of which a row's last visit counts."""
    ours, theirs = row.side("fastlstm"), row.side("torch")
    ratio = ours.to(theirs)
    REPLAY.report(benchmark, ours.times)
    benchmark.extra_info |= {
        "group": case.group,
        "name": case.name,
        "mode": mode,
        "note": case.note,
        "ratio to nn.LSTM": asdict(ratio),
        "noisy": row.is_noisy,
        "seconds": ours.seconds,
        "nn.LSTM seconds": theirs.seconds,
        "threads": ours.threads,
        "nn.LSTM threads": theirs.threads,
    }


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(
    ("case", "mode"), [pytest.param(case, mode, id=f"{case.name}-{mode}") for case in CASES for mode in case.modes]
)
@pytest.mark.parametrize("visit", range(1, VISITS + 2))  # the lowest decorator's parameter changes least often
def test_speed(benchmark, case, mode, visit):
    row = ROWS[case.key(mode)]
    if visit > VISITS and not row.is_noisy:
        pytest.skip("the row has a result")
    try:
        runs = case.runs(mode)
    except Skip as reason:
        pytest.skip(str(reason))
    rival = next(name for name in THEIRS if name in runs)
    others = machine.Others()
    sides = case.sides({OURS: runs[OURS], rival: runs[rival]}, ROUNDS, SECONDS)
    sides = {OURS: sides[OURS], "torch": sides[rival]}
    (row.busy if others.processors() > machine.BUSY else row.quiet).append(sides)
    record(benchmark, case, mode, row)
