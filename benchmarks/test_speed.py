"""What fastlstm gains over torch: sequences, single steps, GRUs, own cells and int8 on a CPU, and layers on a GPU.

pytest benchmarks/ --benchmark-only

`benchmarks.shared.clock` does the timing: both sides in turns, on a settled machine. On a GPU `benchmarks.gpu.layers`
does it. pytest-benchmark only keeps the times, and conftest.py prints the table. `make bench` measures a whole grid,
and `python -m benchmarks.gpu` all that is to know of a GPU.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pytest
import torch

from benchmarks import across
from benchmarks.cpu import int8, steps
from benchmarks.gpu import layers
from benchmarks.shared import machine
from benchmarks.shared.clock import Run, Side, compare
from benchmarks.shared.contest import Contest
from benchmarks.shared.shapes import MODES, SOME, Shape
from benchmarks.shared.tables import ZEROS
from fastlstm.backends import dispatch

ROUNDS, SECONDS = 21, 3.0  # of a row: rounds, unless they take longer
GRUS = (Shape(28, 128, 28, 128, cell="GRU"), Shape(128, 64, 256, 256, cell="GRU"))
CELLS = ((1, 128, 512), (32, 128, 256))  # B, I, H


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


@functools.lru_cache(maxsize=1)
def checked(shape: Shape) -> Contest:
    contest = Contest(shape)
    contest.check()
    return contest


def of_layer(shape: Shape, mode: str) -> dict[str, Run]:
    contest = checked(shape)
    return {"torch": contest.run(contest.theirs, mode), "fastlstm": contest.run("fastlstm", mode)}


def of_own_cell(mode: str) -> dict[str, Run]:
    _, runs = next(across.norms())
    across.check(runs)
    return {name: runs[name][mode] for name in ("torch", "fastlstm")}


def of_int8(mode: str) -> dict[str, Run]:
    _, runs = int8.contenders(1, 512, 512)
    return {"torch": runs["nn.LSTM"], "fastlstm": runs["int8"]}


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    runs: Callable[[str], dict[str, Run]]  # "torch" and "fastlstm" by mode, checked
    modes: tuple[str, ...] = MODES
    note: str = ""


CASES = [
    *(Case("sequences", str(shape), functools.partial(of_layer, shape)) for shape in SOME if shape.T > 1),
    *(Case("steps", f"cell-B{B}-I{I}-H{H}", functools.partial(steps.runs, B, I, H)) for B, I, H in CELLS),
    *(Case("steps", str(s), functools.partial(of_layer, s), note=ZEROS) for s in SOME if s.T == 1),
    *(Case("GRU", str(shape), functools.partial(of_layer, shape)) for shape in GRUS),
    Case("own cells", "LSTM with norms, T28-B128-I28-H128", of_own_cell),
    Case("int8", "int8 beside float32, T477-B1-I512-H512", of_int8, modes=MODES[:1]),
]


def record(benchmark, group: str, name: str, mode: str, sides: dict[str, Side], noisy: bool, note: str = "") -> None:
    """Keep what conftest.py prints and `benchmarks.change` reads."""
    ours, theirs = sides["fastlstm"], sides["torch"]
    ratio = ours.to(theirs)
    REPLAY.report(benchmark, ours.times)
    benchmark.extra_info |= {
        "group": group,
        "name": name,
        "mode": mode,
        "note": note,
        "ratio to nn.LSTM": asdict(ratio),
        "noisy": noisy or ratio.noisy,
        "seconds": ours.seconds,
        "nn.LSTM seconds": theirs.seconds,
        "threads": ours.threads,
        "nn.LSTM threads": theirs.threads,
    }


@functools.lru_cache(maxsize=1)
def checked_on_a_gpu(shape: Shape) -> Contest:
    return layers.contest_of(shape, "bf16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", layers.SHAPES, ids=str)
def test_speed_on_a_gpu(benchmark, shape, mode):
    reason = dispatch.module("triton").supports(torch.device(layers.DEVICE), torch.bfloat16)
    if reason is not None:  # said before anything is computed
        pytest.skip(reason)
    contest = checked_on_a_gpu(shape)
    sides = layers.times(layers.calls(contest, mode, "eager"), "eager", ROUNDS)
    group = f"{torch.cuda.get_device_name()}, bf16"
    record(benchmark, group, str(shape), mode, {**sides, "torch": sides[contest.theirs]}, noisy=False)


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(
    ("case", "mode"), [pytest.param(case, mode, id=f"{case.name}-{mode}") for case in CASES for mode in case.modes]
)
def test_speed(benchmark, case, mode):
    runs, others = case.runs(mode), machine.Others()
    sides = compare(runs, ROUNDS, limit=SECONDS)
    record(benchmark, case.group, case.name, mode, sides, others.share() > machine.BUSY, case.note)
